"""Studies: many trained models compared, each step of the work done once and kept."""

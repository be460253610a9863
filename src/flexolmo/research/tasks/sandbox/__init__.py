"""Programs that a model wrote, run shut away from this machine."""

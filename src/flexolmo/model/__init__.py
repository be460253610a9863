"""The anchor's decoder, the mixture around it, and their files."""

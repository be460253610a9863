"""Training: the loop, a small anchor, and an owner's expert."""

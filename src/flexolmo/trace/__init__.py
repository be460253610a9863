"""Tracing an output to the training text it may come from, where that text lies."""

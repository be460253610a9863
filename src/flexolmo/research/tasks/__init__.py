"""Thirty-one tasks: items, prompts, metrics, running and comparing."""

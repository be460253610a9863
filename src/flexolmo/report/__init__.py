"""Figures and pages for people: drawing, plots, pages, Markdown."""

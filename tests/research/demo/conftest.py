"""Fixtures of a finished run that never was."""

from made_runs import make_page, make_results, no_figures

__all__ = ["make_page", "make_results", "no_figures"]

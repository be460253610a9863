"""The demo: the whole story on real text, and its report."""

"""Steps: cached pieces of work in processes of their own, as a graph."""

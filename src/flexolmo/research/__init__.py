"""Research: reproduces papers with the product; only the command line and benchmarks import it."""

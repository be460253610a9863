"""Merging: verified bundles and the anchor become one mixture; and out to the stock format."""

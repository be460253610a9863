"""Expert bundles: what an owner claims, who signed it, and the checks before anything is used."""

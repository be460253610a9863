"""Public corpora, downloaded from package registries through their own clients."""

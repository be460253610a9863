"""Rival methods: their models, fitted routers, readers, and proxy data."""

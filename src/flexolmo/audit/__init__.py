"""Attacks on what leaves an owner's house, run by the owner before anyone else can."""

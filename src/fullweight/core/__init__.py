"""Configuration, errors, shared types and the registry: the bottom layer, imported by everything."""

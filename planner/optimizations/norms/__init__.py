"""Optimisations of the norms."""

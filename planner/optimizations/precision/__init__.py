"""Optimisations of precision."""

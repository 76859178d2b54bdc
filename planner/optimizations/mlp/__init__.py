"""Optimisations of the MLP."""

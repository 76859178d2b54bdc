"""Optimisations of weights."""

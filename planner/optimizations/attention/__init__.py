"""Optimisations of attention."""

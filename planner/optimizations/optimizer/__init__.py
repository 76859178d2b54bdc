"""Optimisations of optimizer."""

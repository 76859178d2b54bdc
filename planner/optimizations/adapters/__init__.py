"""Optimisations of adapters."""

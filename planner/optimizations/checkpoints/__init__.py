"""Optimisations of checkpoints."""

"""Optimisations of the learning rate."""

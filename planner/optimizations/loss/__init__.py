"""Optimisations of loss."""

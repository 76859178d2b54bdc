"""Optimisations of the gradients between the backward pass and the optimiser."""

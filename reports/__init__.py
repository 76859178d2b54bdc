"""Measured runs, and what is rendered from them."""

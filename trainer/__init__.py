"""Trains what the planner planned. Imports planner, never the reverse."""

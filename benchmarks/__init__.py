"""Measurements, each side by side with the alternatives."""

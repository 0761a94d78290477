"""Simulation: an in-process grid, data, partitions, and Flower's own engine."""

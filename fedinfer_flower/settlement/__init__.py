"""Rewards without opening a single answer: evidence, row sums, reveals."""

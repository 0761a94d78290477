"""Rephrasers, one file each."""

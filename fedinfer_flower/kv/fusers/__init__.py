"""Kinds of fusers: one file each, registered by existing."""

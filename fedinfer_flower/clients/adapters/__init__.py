"""Local models of any kind behind one face: inputs in, logits out."""

from fedinfer_flower.clients.adapters.base import ModelAdapter, adapt

__all__ = ["ModelAdapter", "adapt"]

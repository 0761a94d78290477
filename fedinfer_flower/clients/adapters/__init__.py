"""Local models of any kind behind one face: inputs in, logits out."""

from fedinfer_flower.clients.adapters.base import ModelAdapter, adapt
from fedinfer_flower.clients.adapters.registry import MODELS, ModelKind, make_model

__all__ = ["MODELS", "ModelAdapter", "ModelKind", "adapt", "make_model"]

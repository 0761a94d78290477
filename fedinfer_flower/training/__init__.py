"""Training at the site with a promise about every record: DP-SGD, and what to say of it."""

from fedinfer_flower.training.dp_sgd import DPTrained, train_privately
from fedinfer_flower.training.explicit_positions import with_explicit_positions
from fedinfer_flower.training.poisson_batches import BatchAudit
from fedinfer_flower.training.record_privacy import RecordPrivacy

__all__ = [
    "BatchAudit",
    "DPTrained",
    "RecordPrivacy",
    "train_privately",
    "with_explicit_positions",
]

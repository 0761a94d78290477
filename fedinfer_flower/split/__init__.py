"""Model splitting: early layers here, an embedding travels, the rest runs elsewhere."""

from fedinfer_flower.split.front import SplitFront, embedding_noise_std, front_digest
from fedinfer_flower.split.network import split_back, split_network
from fedinfer_flower.split.tail import EmbeddingTail, SiteFront
from fedinfer_flower.split.train import SplitTrained, train_split

__all__ = [
    "EmbeddingTail",
    "SiteFront",
    "SplitFront",
    "SplitTrained",
    "embedding_noise_std",
    "front_digest",
    "split_back",
    "split_network",
    "train_split",
]

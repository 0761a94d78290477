"""The querier: asks, holds the keys, opens the combined answer."""

from fedinfer_flower.querier.querier import Querier

__all__ = ["Querier"]

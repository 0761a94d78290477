"""Joint computation on secret shares: neither query nor weights are seen by any one party."""

from __future__ import annotations

from fedinfer_flower.mpc.forward import Disclosed, MpcRule
from fedinfer_flower.mpc.network import NetworkSpec

__all__ = ["Disclosed", "MpcRule", "NetworkSpec"]

"""Which layer of a sharer each layer of a receiver reads."""

from __future__ import annotations

from typing import Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["LAYER_MAPS", "layer_map"]

LAYER_MAPS: Final = ("bottom", "depth", "terminal")


def layer_map(sharer: int, receiver: int, how: str = "depth") -> tuple[int, ...]:
    """Return, for each layer of the receiver, a layer of the sharer.

    Parameters
    ----------
    sharer, receiver : int
        Numbers of layers.
    how : str
        ``"bottom"``: first with first, the sharer's last for what is left over (FedRefine's
        case study). ``"terminal"``: last with last, the sharer's first for what is left
        over (C2C's ``last_aligned``). ``"depth"``: proportional to depth, first with first
        and last with last (C2C's ``k_nearest`` with k = 1).

    Raises
    ------
    InvalidValueError

    Examples
    --------
    >>> layer_map(3, 5, "bottom"), layer_map(3, 5, "terminal"), layer_map(3, 5, "depth")
    ((0, 1, 2, 2, 2), (0, 0, 0, 1, 2), (0, 0, 1, 2, 2))
    """
    if sharer < 1 or receiver < 1:
        raise InvalidValueError("a layer map needs at least one layer on both sides")
    last = sharer - 1
    if how == "bottom":
        return tuple(min(layer, last) for layer in range(receiver))
    if how == "terminal":
        return tuple(max(layer + sharer - receiver, 0) for layer in range(receiver))
    if how == "depth":
        steps = max(receiver - 1, 1)
        # Rounds halves to even, as Python does: the same on every machine.
        return tuple(round(layer * last / steps) for layer in range(receiver))
    raise InvalidValueError(
        f"no layer map is called {how[:64]!r}", hint=f"known: {', '.join(LAYER_MAPS)}"
    )

"""Which arrays each kind of fitted aggregator has.

==================  ==================================================================
kind                arrays (K sites, C classes, H, D, M free)
==================  ==================================================================
``linear-stack``    ``weights_kcc`` (K, C, C), ``bias_kc`` (K, C)
``deep-set``        ``rho_in`` (2C, H), ``rho_in_bias`` (H), ``rho_out`` (H, D),
                    ``rho_out_bias`` (D), ``mu_in`` (C + D, M), ``mu_in_bias`` (M),
                    ``mu_out`` (M, C), ``mu_out_bias`` (C), ``skip`` (1)
``gated-mixture``   ``gate_kc`` (K, C), ``gate_bias_k`` (K)
``mlp-stack``       ``hidden`` (KC, M), ``hidden_bias`` (M), ``out`` (M, C),
                    ``out_bias`` (C), ``skip`` (1)
==================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError

__all__ = ["KINDS", "MAX_EMBEDDING_PER_CLASS", "require_shapes", "start_arrays"]

MAX_EMBEDDING_PER_CLASS: Final = 2
"""Most embedding entries per class of a deep set: a sum of more numbers says more of the
single answers in it."""

_SIZES: Final[Mapping[str, Mapping[str, str]]] = {
    "linear-stack": {"weights_kcc": "KCC", "bias_kc": "KC"},
    "deep-set": {
        "rho_in": "2H",
        "rho_in_bias": "H",
        "rho_out": "HD",
        "rho_out_bias": "D",
        "mu_in": "EM",
        "mu_in_bias": "M",
        "mu_out": "MC",
        "mu_out_bias": "C",
        "skip": "1",
    },
    "gated-mixture": {"gate_kc": "KC", "gate_bias_k": "K"},
    "mlp-stack": {
        "hidden": "AM",
        "hidden_bias": "M",
        "out": "MC",
        "out_bias": "C",
        "skip": "1",
    },
}

KINDS: Final = tuple(_SIZES)

FloatArray = npt.NDArray[np.float64]


def require_shapes(
    kind: str, arrays: Mapping[str, FloatArray], *, n_sites: int, n_classes: int
) -> None:
    """Require exactly the arrays of a kind, in shapes that fit each other.

    Raises
    ------
    InvalidValueError
        Naming the array.
    """
    if kind not in _SIZES:
        raise InvalidValueError(
            f"no kind of aggregator {str(kind)[:32]!r}", hint=f"kinds: {', '.join(KINDS)}"
        )
    wanted = _SIZES[kind]
    if set(arrays) != set(wanted):
        raise InvalidValueError(f"{kind} has the arrays {', '.join(wanted)}")
    sizes = {"K": n_sites, "C": n_classes, "1": 1, "2": 2 * n_classes, "A": n_sites * n_classes}
    for letter, name, axis in (("H", "rho_out", 0), ("D", "rho_out", 1), ("M", "mu_out", 0)):
        if name in arrays and arrays[name].ndim == 2:
            sizes[letter] = arrays[name].shape[axis]
    if "out" in arrays and arrays["out"].ndim == 2:
        sizes["M"] = arrays["out"].shape[0]
    sizes["E"] = n_classes + sizes.get("D", 0)
    for name, letters in wanted.items():
        expected = tuple(sizes.get(letter, 0) for letter in letters)
        if arrays[name].shape != expected:
            raise InvalidValueError(
                f"array {name!r} of a {kind} has shape {arrays[name].shape}, expected {expected}"
            )
    if sizes.get("D", 0) > MAX_EMBEDDING_PER_CLASS * n_classes:
        raise InvalidValueError(
            f"an embedding of {sizes['D']} for {n_classes} classes; at most"
            f" {MAX_EMBEDDING_PER_CLASS} a class"
        )


def start_arrays(
    kind: str, *, n_sites: int, n_classes: int, hidden: int = 32, seed: int = 0
) -> dict[str, FloatArray]:
    """Return the arrays that training starts from: all kinds start near the mean.

    Parameters
    ----------
    hidden : int
        H and M of a deep set, M of an MLP stack; the embedding D has one entry a class.
    seed : int
        Of the hidden layers' weights, which protect nothing.

    Examples
    --------
    >>> start_arrays("linear-stack", n_sites=1, n_classes=2)["weights_kcc"]
    array([[[2., 0.],
            [0., 2.]]])
    """
    rng = np.random.default_rng(seed)

    def layer(fan_in: int, fan_out: int) -> FloatArray:
        return rng.normal(0.0, fan_in**-0.5, (fan_in, fan_out))

    k, c, zeros = n_sites, n_classes, np.zeros
    if kind == "linear-stack":
        return {"weights_kcc": np.tile(2.0 * np.eye(c), (k, 1, 1)), "bias_kc": zeros((k, c))}
    if kind == "gated-mixture":
        return {"gate_kc": zeros((k, c)), "gate_bias_k": zeros(k)}
    if kind == "mlp-stack":
        return {
            "hidden": 2.0 * layer(k * c, hidden),
            "hidden_bias": zeros(hidden),
            "out": zeros((hidden, c)),
            "out_bias": zeros(c),
            "skip": np.full(1, 2.0),
        }
    return {
        "rho_in": np.sqrt(2.0) * layer(2 * c, hidden),
        "rho_in_bias": zeros(hidden),
        "rho_out": layer(hidden, c),
        "rho_out_bias": zeros(c),
        "mu_in": layer(2 * c, hidden),
        "mu_in_bias": zeros(hidden),
        "mu_out": zeros((hidden, c)),
        "mu_out_bias": zeros(c),
        "skip": np.full(1, 2.0),
    }

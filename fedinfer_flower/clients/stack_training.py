"""One site's step in the training of a stack: cross-entropy on its own held-out rows.

The linear kind is worked out in NumPy, the others with torch, in float64. What a network
computes here is what its rule computes: a test holds the two to each other.

Axes: K sites, B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.ensemble.gated_mixture import GATE_FLOOR
from fedinfer_flower.ensemble.stack_rule import log_features
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["local_step", "stack_logits"]

Labels = npt.NDArray[np.int64]

_UNDECAYED: Final = ("skip",)
"""Near the mean probability is where training starts, and no weight to shrink."""


def local_step(
    kind: str,
    arrays: Mapping[str, Array],
    answers_kbc: Array,
    labels_b: Labels,
    *,
    steps: int = 1,
    learning_rate: float = 1.0,
    decay: float = 1e-3,
) -> tuple[dict[str, Array], float]:
    """Return the arrays after full-batch gradient steps, and the loss before the first.

    With one step of rate 1, a weighted mean of the sites' arrays is one step along the
    gradient over all sites' rows, which a server-side optimiser can scale.

    Parameters
    ----------
    kind : str
    arrays : mapping of str to array
    answers_kbc : float array of shape (n_sites, n_rows, n_classes)
        All sites' probabilities on this site's held-out rows.
    labels_b : int array of shape (n_rows,)
    steps : int
    learning_rate : float
    decay : float
        Half the pull of a weight towards its start (linear) or zero (others), per step.
    """
    moved = {name: np.array(array, dtype=np.float64) for name, array in arrays.items()}
    gradient = _linear_gradient if kind == "linear-stack" else _network_gradient(kind)
    first = 0.0
    for number in range(steps):
        loss, slopes = gradient(moved, answers_kbc, labels_b)
        first = loss if number == 0 else first
        for name, slope in slopes.items():
            start = 2.0 * np.eye(moved[name].shape[-1]) if name == "weights_kcc" else 0.0
            pull = 0.0 if name in _UNDECAYED else 2.0 * decay
            moved[name] -= learning_rate * (slope + pull * (moved[name] - start))
    if not all(np.isfinite(array).all() for array in moved.values()):
        raise InvalidValueError("the training step diverged", hint="lower the learning rate")
    return moved, first


def stack_logits(kind: str, arrays: Mapping[str, Array], answers_kbc: Array) -> Array:
    """Return the logits that are trained, shape (n_rows, n_classes)."""
    if kind == "linear-stack":
        return _linear_logits(arrays, answers_kbc)
    torch = _torch()
    tensors = {name: torch.tensor(np.array(array)) for name, array in arrays.items()}
    return np.asarray(_FORWARD[kind](tensors, answers_kbc).numpy())


Gradient = Callable[[Mapping[str, Array], Array, Labels], tuple[float, dict[str, Array]]]


def _linear_logits(arrays: Mapping[str, Array], answers_kbc: Array) -> Array:
    parts = np.einsum("kbi,kic->bc", answers_kbc, arrays["weights_kcc"])
    return np.asarray(parts + arrays["bias_kc"].sum(axis=0))


def _linear_gradient(
    arrays: Mapping[str, Array], answers_kbc: Array, labels_b: Labels
) -> tuple[float, dict[str, Array]]:
    logits = _linear_logits(arrays, answers_kbc)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels_b))
    error = np.exp(log_p)
    error[rows, labels_b] -= 1.0
    error /= len(labels_b)
    slopes = {
        "weights_kcc": np.einsum("kbi,bc->kic", answers_kbc, error),
        "bias_kc": np.tile(error.sum(axis=0), (len(answers_kbc), 1)),
    }
    return float(-log_p[rows, labels_b].mean()), slopes


def _network_gradient(kind: str) -> Gradient:
    torch = _torch()

    def gradient(
        arrays: Mapping[str, Array], answers_kbc: Array, labels_b: Labels
    ) -> tuple[float, dict[str, Array]]:
        tensors = {n: torch.tensor(np.array(a), requires_grad=True) for n, a in arrays.items()}
        logits = _FORWARD[kind](tensors, answers_kbc)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels_b))
        slopes = torch.autograd.grad(loss, list(tensors.values()))
        return float(loss.detach()), {n: s.numpy() for n, s in zip(tensors, slopes, strict=True)}

    return gradient


def _deep_set(arrays: Mapping[str, Tensor], answers_kbc: Array) -> Tensor:
    torch = _torch()
    features = torch.tensor(log_features(answers_kbc))
    inner = torch.relu(features @ arrays["rho_in"] + arrays["rho_in_bias"])
    embedded = torch.tanh(inner @ arrays["rho_out"] + arrays["rho_out_bias"]).sum(dim=0)
    total = torch.tensor(answers_kbc.sum(axis=0))
    both = torch.cat([total, embedded], dim=1)
    decoded = torch.relu(both @ arrays["mu_in"] + arrays["mu_in_bias"]) @ arrays["mu_out"]
    logits: Tensor = arrays["skip"] * total + decoded + arrays["mu_out_bias"]
    return logits


def _gated(arrays: Mapping[str, Tensor], answers_kbc: Array) -> Tensor:
    torch = _torch()
    answers = torch.tensor(answers_kbc)
    inner = torch.einsum("kbc,kc->kb", answers, arrays["gate_kc"])
    weights = torch.sigmoid(inner + arrays["gate_bias_k"][:, None])
    weights = (GATE_FLOOR + (1.0 - GATE_FLOOR) * weights)[..., None]
    # Logarithms of a mixture of probabilities: its softmax is the mixture itself.
    mixture: Tensor = torch.log((weights * answers).sum(dim=0) / weights.sum(dim=0))
    return mixture


def _mlp(arrays: Mapping[str, Tensor], answers_kbc: Array) -> Tensor:
    torch = _torch()
    n_rows = answers_kbc.shape[1]
    side_by_side = torch.tensor(answers_kbc.transpose(1, 0, 2).reshape(n_rows, -1))
    inner = torch.tanh(side_by_side @ arrays["hidden"] + arrays["hidden_bias"])
    total = torch.tensor(answers_kbc.sum(axis=0))
    logits: Tensor = arrays["skip"] * total + inner @ arrays["out"] + arrays["out_bias"]
    return logits


_FORWARD: Final[dict[str, Callable[[Mapping[str, Any], Array], Any]]] = {
    "deep-set": _deep_set,
    "gated-mixture": _gated,
    "mlp-stack": _mlp,
}


def _torch() -> Any:
    return optional_module("torch", extra="torch")

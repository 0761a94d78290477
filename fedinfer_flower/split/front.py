"""The querier's part of a split model: clip the embedding, add noise, let it go.

Axes: B queries, D dimensions of the flat embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ModelAnswerError
from fedinfer_flower.privacy import gaussian_dp, noise

if TYPE_CHECKING:
    import torch

    Front = torch.nn.Module | Callable[[npt.NDArray[Any]], npt.NDArray[Any]]

__all__ = ["SplitFront", "clip_rows", "embedding_noise_std", "front_digest", "run_layers"]

Embeddings = npt.NDArray[np.float32]

_GRID_BITS: Final = 20
"""Grid steps in the clipping norm, as a power of two: finer than any noise of use."""

_MAX_EPSILON: Final = 64.0
_MAX_DELTA: Final = 1e-3


def run_layers(layers: Front, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Run a torch module or a callable on arrays; a module in evaluation mode.

    Raises
    ------
    ModelAnswerError
        If there is not one finite row of output for each row of input.
    """
    if hasattr(layers, "state_dict") and hasattr(layers, "eval"):
        out = _run_module(layers, inputs)
    else:
        out = np.asarray(layers(inputs), dtype=np.float64)
    if out.ndim < 2 or len(out) != len(inputs):
        raise ModelAnswerError(
            f"the layers turned inputs of shape {inputs.shape} into {out.shape}",
            hint="one row of output for each row of input",
        )
    if not np.isfinite(out).all():
        raise ModelAnswerError("the layers returned NaN or infinite values")
    return out


def _run_module(layers: Any, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    import torch

    batch = torch.from_numpy(np.array(inputs))
    first = next(iter(layers.parameters()), None)
    if first is not None:
        dtype = first.dtype if batch.is_floating_point() else batch.dtype
        batch = batch.to(device=first.device, dtype=dtype)
    was_training = layers.training
    try:
        with torch.inference_mode():
            out = layers.eval()(batch)
    finally:
        layers.train(was_training)
    return np.asarray(out.to("cpu", torch.float64).numpy())


def clip_rows(rows: npt.NDArray[np.float64], clip_norm: float) -> npt.NDArray[np.float64]:
    """Scale rows that are longer than `clip_norm` down to it.

    Examples
    --------
    >>> clip_rows(np.array([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    array([[0.6, 0.8],
           [0.3, 0.4]])
    """
    # By the largest entry first: the square of a huge one overflows.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    shrunk = rows / np.maximum(largest / clip_norm, 1.0)
    norms = np.linalg.norm(shrunk, axis=1, keepdims=True)
    return np.asarray(shrunk * (clip_norm / np.maximum(norms, clip_norm)))


def embedding_noise_std(*, clip_norm: float, epsilon: float, delta: float) -> float:
    """Return the deviation of the noise on each entry of an embedding, before rounding.

    ``2 * clip_norm / mu(epsilon, delta)``, by the exact calibration of the Gaussian
    mechanism: two queries are at most `2 * clip_norm` apart.

    Examples
    --------
    >>> round(embedding_noise_std(clip_norm=1.0, epsilon=1.0, delta=1e-5), 2)
    7.46
    """
    return 2.0 * clip_norm / gaussian_dp.mu_for(epsilon, delta)


class SplitFront:
    """Turn private queries into embeddings that may travel.

    Use where the query is the secret, its early layers may be public, and some loss of
    accuracy is acceptable. The noisy embeddings are ordinary query rows:
    ``querier.ask(front.embed(inputs), ...)``; sites hold the rest of the network.

    Parameters
    ----------
    front : torch.nn.Module or callable
        Published by the federation, the same for all. From inputs of shape
        (n_queries, ...) to embeddings of shape (n_queries, ...), which are flattened.
    clip_norm : float
        L2 norm to which each embedding is clipped.
    epsilon : float, optional
        Privacy of one query row, in (0, 64]; None for no noise, **and no privacy**.
    delta : float
        In (0, 1e-3].

    Raises
    ------
    InvalidValueError
        If an option is out of range.

    Privacy
    -------
    Neighbours: one query row is replaced by any other. With `epsilon` each row that
    leaves is (epsilon, delta)-private towards everyone else, alone or colluding:
    coordinator, sites, and whoever relays. K rows about one person, or the same row asked
    K times, compose: `total_epsilon_delta`. Keep an embedding and send it again, rather
    than drawing new noise.

    Without `epsilon` an embedding is not private. It takes an attacker a linear
    regression to turn it back into an image much like the input, and a table of
    candidates to tell which one was asked.

    Not covered: how many rows are asked, when, and what the answer is used for. Answers
    are the sites' secret, for which the ordinary protections are there.

    References
    ----------
    .. [1] Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, ICML
       2018, theorem 8.

    Examples
    --------
    >>> front = SplitFront(lambda rows: rows[:, :2], clip_norm=1.0)
    >>> front.embed(np.array([[3.0, 4.0, 9.0]]))
    array([[0.6, 0.8]], dtype=float32)
    >>> noisy = SplitFront(lambda rows: rows[:, :2], clip_norm=1.0, epsilon=4.0)
    >>> noisy.embed(np.zeros((5, 3))).shape
    (5, 2)
    """

    def __init__(
        self,
        front: Front,
        *,
        clip_norm: float,
        epsilon: float | None = None,
        delta: float = 1e-5,
    ) -> None:
        if not (math.isfinite(clip_norm) and clip_norm > 0.0):
            raise InvalidValueError(f"clip_norm is a positive number, got {clip_norm!r}")
        if epsilon is not None and not 0.0 < epsilon <= _MAX_EPSILON:
            raise InvalidValueError(
                f"epsilon (per query row) is in (0, {_MAX_EPSILON:g}], got {epsilon!r}",
                hint="leave it out for no noise",
            )
        if not 0.0 < delta <= _MAX_DELTA:
            raise InvalidValueError(f"delta is in (0, {_MAX_DELTA:g}], got {delta!r}")
        self._front = front
        self.clip_norm = float(clip_norm)
        self.epsilon = None if epsilon is None else float(epsilon)
        self.delta = float(delta)

    def __repr__(self) -> str:
        return f"SplitFront(clip_norm={self.clip_norm:g}, epsilon={self.epsilon})"

    def embed(self, inputs: npt.ArrayLike) -> Embeddings:
        """Return embeddings of shape (n_queries, n_dimensions), clipped, noisy if asked for.

        Every call draws new noise and spends epsilon anew.

        Raises
        ------
        InvalidValueError
            If there are no queries.
        ModelAnswerError
            If the front fails its part: wrong number of rows, NaN.
        MissingExtraError
            Noise without the extra ``dp``.
        """
        rows = np.asarray(inputs)
        if rows.ndim < 2 or len(rows) < 1:
            raise InvalidValueError(f"inputs have shape (n_queries, ...), got {rows.shape}")
        flat_bd = run_layers(self._front, rows).reshape(len(rows), -1)
        clipped_bd = clip_rows(flat_bd, self.clip_norm)
        if self.epsilon is None:
            return clipped_bd.astype(np.float32)
        step = self.clip_norm * 2.0**-_GRID_BITS
        steps_bd = np.rint(clipped_bd / step).astype(np.int64)
        noisy_bd = steps_bd + noise.gaussian_integers(
            steps_bd.shape, self._std_steps(steps_bd.shape[1])
        )
        # The only thing that leaves is a function of the whole numbers.
        return np.asarray(noisy_bd * step, dtype=np.float32)

    def noise_std(self, n_dimensions: int) -> float:
        """Return the standard deviation of the noise on each entry; 0.0 without noise."""
        if self.epsilon is None:
            return 0.0
        return self._std_steps(n_dimensions) * self.clip_norm * 2.0**-_GRID_BITS

    def total_epsilon_delta(self, n_rows: int) -> tuple[float, float]:
        """Return (epsilon, delta) of `n_rows` rows about one person together.

        Exact composition, with this `delta` in total.

        Raises
        ------
        InvalidValueError
            If there is no noise, hence no such promise, or `n_rows` is not positive.

        Examples
        --------
        >>> front = SplitFront(lambda rows: rows, clip_norm=1.0, epsilon=1.0)
        >>> round(front.total_epsilon_delta(1)[0], 6), round(front.total_epsilon_delta(16)[0], 1)
        (1.0, 4.7)
        """
        if self.epsilon is None:
            raise InvalidValueError(
                "without noise an embedding is not private", hint="SplitFront(..., epsilon=4.0)"
            )
        if n_rows < 1:
            raise InvalidValueError(f"n_rows is at least 1, got {n_rows!r}")
        mu = gaussian_dp.compose_mu(gaussian_dp.mu_for(self.epsilon, self.delta), n_rows)
        return gaussian_dp.epsilon_of(mu, self.delta), self.delta

    def _std_steps(self, n_dimensions: int) -> int:
        if self.epsilon is None:  # pragma: no cover - callers ask only with noise
            raise InvalidValueError("there is no noise")
        # Rounding moves each entry by up to half a step, for both of two neighbours.
        sensitivity = 2.0 * 2.0**_GRID_BITS + math.sqrt(n_dimensions)
        return math.ceil(sensitivity / gaussian_dp.mu_for(self.epsilon, self.delta))


def front_digest(front: torch.nn.Module) -> str:
    """Return a fingerprint of a torch module's weights, in hex.

    A back is worth nothing with another front than its own, and nothing fails loudly.
    Publish the digest with the front; sites repeat it in their model card.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(2, 1)
    >>> front_digest(layer) == front_digest(torch.nn.Linear(2, 1))
    False
    """
    digest = hashlib.sha256(b"fedinfer-split-front-1")
    for name, tensor in sorted(front.state_dict().items()):
        array = tensor.detach().to("cpu").contiguous()
        facts = f"{name}|{array.dtype}|{tuple(array.shape)}"
        digest.update(len(facts).to_bytes(4, "little") + facts.encode())
        # As float64: exact for every floating dtype, and bytes of the same kind everywhere.
        digest.update(array.double().numpy().astype("<f8").tobytes())
    return digest.hexdigest()

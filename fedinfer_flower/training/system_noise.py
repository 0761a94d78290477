"""opacus' optimizer with noise from the system's generator, on an integer grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedinfer_flower.privacy import noise
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.training.record_privacy import EXTRA

if TYPE_CHECKING:
    import torch

__all__ = ["system_noise_optimizer"]

_GRID_BITS: Final = 24
"""Grid steps in the clipping norm, as a power of two: what float32 gradients resolve."""

_CLIPPING_SLACK: Final = 1e-5
"""Relative excess of a clipped norm that float32 arithmetic can explain, many times over."""


def system_noise_optimizer(
    optimizer: torch.optim.Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: int,
) -> Any:
    """Wrap an optimizer so that it clips each record's gradient and adds noise to the sum.

    opacus' own noise is torch's generator, which whoever knows its seed can subtract,
    and which any ``torch.manual_seed`` in the process makes known. Here the sum is
    rounded to a grid and whole numbers are added, from `privacy.noise`.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Over the trainable parameters of a ``GradSampleModule``.
    noise_multiplier : float
    max_grad_norm : float
    expected_batch_size : int
        The noisy sum is divided by it: the true size of a batch is private.

    Returns
    -------
    optimizer : opacus.optimizers.DPOptimizer

    Raises
    ------
    MissingExtraError
        Without the extra ``dp-training``.

    Notes
    -----
    A record whose gradient is not finite counts as one without a gradient; it would
    escape clipping otherwise. A batch without records makes a step of pure noise.

    References
    ----------
    .. [1] Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1.
    """
    import torch

    base: Any = optional_module("opacus.optimizers", extra=EXTRA).DPOptimizer

    class SystemNoiseOptimizer(base):  # type: ignore[misc]
        """`DPOptimizer` whose noise has no seed."""

        def set_empty_batch(self) -> None:
            """Take a batch without records: no gradient, and noise all the same."""
            for parameter in self.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))

        def clip_and_accumulate(self) -> None:
            """Clip each record's gradient over all parameters, and add them up."""
            finite = [
                torch.isfinite(p.grad_sample.reshape(len(p.grad_sample), -1)).all(dim=1)
                for p in self.params
                if len(p.grad_sample)
            ]
            if finite and not bool((usable := torch.stack(finite).all(dim=0)).all()):
                for parameter in self.params:
                    parameter.grad_sample[~usable] = 0.0
            super().clip_and_accumulate()

        def add_noise(self) -> None:
            """Round the clipped sum to the grid, and add whole steps of noise."""
            n_values = sum(p.numel() for p in self.params)
            step = self.max_grad_norm * 2.0**-_GRID_BITS
            # Rounding with and without a record differs by up to a step an entry.
            norm = 2.0**_GRID_BITS * (1.0 + _CLIPPING_SLACK) + math.sqrt(n_values)
            std = math.ceil(self.noise_multiplier * norm)
            for parameter in self.params:
                summed = parameter.summed_grad.detach().to("cpu", torch.float64).numpy()
                noisy = np.rint(summed / step) + noise.gaussian_integers(summed.shape, std)
                parameter.grad = torch.from_numpy(np.asarray(noisy * step)).to(parameter)
                parameter.grad = parameter.grad.view_as(parameter)

    return SystemNoiseOptimizer(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        loss_reduction="mean",
    )

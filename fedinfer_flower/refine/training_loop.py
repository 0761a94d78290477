"""The loop that trains fusers and hubs: schedule, best weights, early end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import FuserError, InvalidValueError

__all__ = ["Progress", "TrainingOptions", "TrainingStep", "optimise", "temperature_at"]

_BETAS: Final = (0.9, 0.98)
_LAST_RATE: Final = 0.05
_LAST_TEMPERATURE: Final = 0.05
_ANNEALED: Final = 0.8
_MOST_STEPS: Final = 10_000_000


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a fuser is trained. The defaults are those of the shipped figures.

    Parameters
    ----------
    steps : int
        Most steps; the schedule is laid out for them. Of a hub: for each ordered pair.
    batch : int
        Examples a step.
    lr : float
        Of AdamW, after the warm-up; it falls linearly to 5 %.
    weight_decay : float
    warmup : int
        Steps.
    clip : float
        Largest norm of the gradient.
    seed : int
        The same seed gives the same weights on the same machine and number of threads.
    holdout : float
        Share of the questions held out, for the best weights and for the card.
    check_every : int
        Steps between two looks at the held-out loss.
    patience : int
        Looks without a better loss after which training ends; 0 for never.
    max_answer_tokens : int
    prompt_dropout : float
        In training, the chance that what travels of the prompt is hidden and only what the
        sharer decoded is left: see `hide_prompt`. No effect on shares without decoded tokens.

    Raises
    ------
    InvalidValueError
    """

    steps: int = 400
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 20
    clip: float = 1.0
    seed: int = 0
    holdout: float = 0.1
    check_every: int = 50
    patience: int = 4
    max_answer_tokens: int = 64
    prompt_dropout: float = 0.8

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1), ("batch", 1), ("warmup", 0), ("seed", 0), ("check_every", 1),
            ("patience", 0), ("max_answer_tokens", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _MOST_STEPS:
                raise InvalidValueError(
                    f"{name} of a training is a whole number of at least {least}"
                )
        for name in ("lr", "clip"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InvalidValueError(f"{name} of a training is above 0")
        if not 0.0 <= self.prompt_dropout <= 1.0:
            raise InvalidValueError("prompt_dropout of a training is in [0, 1]")
        if not 0.0 <= self.weight_decay < math.inf or not 0.0 < self.holdout < 1.0:
            raise InvalidValueError("weight_decay is at least 0, holdout in (0, 1)")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        Examples
        --------
        >>> options = TrainingOptions(steps=100, warmup=10, lr=1.0)
        >>> [round(options.rate(step), 2) for step in (0, 9, 50, 99)]
        [0.1, 0.91, 0.5, 0.05]
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * max(_LAST_RATE, 1.0 - step / self.steps)


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Where a training stands.

    Parameters
    ----------
    step, steps : int
        Done, and planned.
    loss : float
        Of the last batch.
    held_out : float, optional
        Where it was just measured.
    """

    step: int
    steps: int
    loss: float
    held_out: float | None = None


Progress = Callable[[TrainingStep], None]


def temperature_at(step: int, steps: int) -> float:
    """Return the temperature of a residual fuser's switches: falls over 80 % of the steps."""
    return max(_LAST_TEMPERATURE, 1.0 - step / (_ANNEALED * steps))


def optimise(
    module: nn.Module,
    options: TrainingOptions,
    *,
    batch_loss: Callable[[int, torch.Generator], Tensor],
    held_out_loss: Callable[[], float],
    progress: Progress | None = None,
) -> tuple[int, float]:
    """Train a module in place; it ends with its best weights, in evaluation mode.

    Parameters
    ----------
    module : torch.nn.Module
        Parameters without gradient stay as they are.
    options : TrainingOptions
    batch_loss : callable
        From the step and a seeded generator to the loss of one batch.
    held_out_loss : callable
        Called in evaluation mode without gradients.
    progress : callable, optional

    Returns
    -------
    steps, loss : int and float
        Taken, and the held-out loss of the weights that are kept.

    Raises
    ------
    FuserError
        If the loss is not finite, or nothing can be trained.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise FuserError("there is nothing to train in this fuser")
    optimiser = torch.optim.AdamW(
        trained, lr=options.lr, weight_decay=options.weight_decay, betas=_BETAS
    )
    draws = torch.Generator().manual_seed(options.seed)
    best, kept, waited, step = math.inf, copy.deepcopy(module.state_dict()), 0, 0
    for step in range(1, options.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = options.rate(step - 1)
        module.train()
        loss = batch_loss(step - 1, draws)
        _require_finite(float(loss.detach()))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, options.clip)
        optimiser.step()
        held_out = None
        if step % options.check_every == 0 or step == options.steps:
            module.eval()
            with torch.no_grad():
                held_out = held_out_loss()
            _require_finite(held_out)
            waited += 1
            if held_out < best:
                best, kept, waited = held_out, copy.deepcopy(module.state_dict()), 0
        if progress is not None:
            progress(
                TrainingStep(
                    step=step, steps=options.steps, loss=float(loss.detach()), held_out=held_out
                )
            )
        if options.patience and waited >= options.patience:
            break
    module.load_state_dict(kept)
    module.eval()
    return step, best


def _require_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise FuserError(
            "the loss of the training is not finite",
            hint="lower the learning rate, and look at what the models answer alone",
        )

"""DP-SGD: train a model such that no single record shows, in it or in its answers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ModelError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.training.poisson_batches import BatchAudit, PoissonBatches
from fedinfer_flower.training.preflight import check_per_record_gradients, quiet_hooks, supported
from fedinfer_flower.training.record_privacy import (
    EXTRA,
    RecordPrivacy,
    calibrated_noise,
    require_accountant,
    spent_epsilon,
)
from fedinfer_flower.training.system_noise import system_noise_optimizer

if TYPE_CHECKING:
    import torch

    MakeOptimizer = Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]
    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

__all__ = ["DPTrained", "train_privately"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DPTrained:
    """A model trained with DP-SGD, and what may be said of it.

    Parameters
    ----------
    model : torch.nn.Module
        Plain, in evaluation mode; fit for `LocalModel`.
    statement : RecordPrivacy
    audit : BatchAudit
        Stays at the site.
    """

    model: torch.nn.Module
    statement: RecordPrivacy
    audit: BatchAudit


def train_privately(
    model: torch.nn.Module,
    inputs: torch.Tensor | npt.NDArray[Any],
    labels: torch.Tensor | npt.NDArray[Any],
    *,
    epsilon: float,
    delta: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    max_grad_norm: float = 1.0,
    optimizer: str | MakeOptimizer = "sgd",
    loss: Loss | None = None,
    accountant: str = "prv",
    fix_layers: bool = False,
    check_gradients: bool = True,
    seed: int | None = None,
) -> DPTrained:
    """Train a copy of a torch model with DP-SGD.

    Use where records must not show, however often the model is asked: answers add
    nothing to epsilon. Prefer protection `dp` where the site's whole answer is the
    secret, and answers are few.

    Parameters
    ----------
    model : torch.nn.Module
        Its initial weights must not depend on the records. Parameters with
        ``requires_grad=False`` stay as they are.
    inputs : array of shape (n_records, ...)
    labels : array of shape (n_records, ...)
        As `loss` wants them; int64 classes for the default.
    epsilon : float
        In [0.05, 64]; what is spent is at most this, see the statement.
    delta : float
        Below ``1 / n_records``; better below a tenth of that, else a warning says so.
    epochs, batch_size : int
        ``ceil(epochs * n_records / batch_size)`` steps, each record in each batch with
        chance ``batch_size / n_records``. So batches vary in size around `batch_size`.
    learning_rate : float
        More noise wants a lower one.
    max_grad_norm : float
        L2 norm to which each record's gradient is clipped.
    optimizer : {"sgd", "adam"} or callable
        A callable gets the trainable parameters and the learning rate.
    loss : callable
        From outputs and labels to the mean over records; default cross-entropy.
    accountant : {"prv", "rdp"}
        See `spent_epsilon`.
    fix_layers : bool
        Replace layers that mix records, such as BatchNorm by GroupNorm. Trained weights of
        these layers are lost.
    check_gradients : bool
        Compare gradients of four records with those of each record alone, on a copy.
        Only leave out for a model that is random in training mode.
    seed : int, optional
        Of torch's generator, for dropout and the like. The noise and the choice of
        records have no seed: two trainings never agree.

    Returns
    -------
    trained : DPTrained

    Raises
    ------
    InvalidValueError
        If a number is out of range, or the records do not fit each other.
    ModelError
        If the model has no gradient for each record, or did not stay finite.
    MissingExtraError
        Without the extra ``dp-training``.

    Privacy
    -------
    See `RecordPrivacy` for who is promised what, and for what is not covered. In
    particular every training counts: of ten trainings with different learning rates on
    the same records, of which the best is kept, this statement covers the last one only.
    Tune on public data, or add up the epsilons of all of them.

    Noise and choice of records come from the operating system's generator, not from
    torch's, whose state a caller's ``torch.manual_seed`` would give away. Timing, memory
    and logs of the training are not protected.

    References
    ----------
    .. [1] Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1.

    Examples
    --------
    >>> import torch
    >>> trained = train_privately(
    ...     torch.nn.Linear(4, 2), torch.randn(100, 4), torch.arange(100) % 2,
    ...     epsilon=8.0, delta=1e-4, epochs=1, batch_size=25, learning_rate=0.5,
    ... )
    >>> trained.statement.steps, trained.statement.epsilon <= 8.0
    (4, True)
    """
    torch_module = optional_module("torch", extra=EXTRA)
    require_accountant(accountant)
    plain = supported(model, fix_layers=fix_layers)
    own = copy.deepcopy(plain)  # opacus leaves hooks and attributes behind
    device = next(own.parameters()).device
    rows = torch_module.as_tensor(inputs).to(device)
    truth = torch_module.as_tensor(labels).to(device)
    _check_numbers(rows, truth, delta, epochs, batch_size, learning_rate, max_grad_norm)
    mean_loss: Loss = loss or torch_module.nn.functional.cross_entropy
    with torch_module.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            torch_module.manual_seed(seed)
        check_per_record_gradients(own, rows, truth, mean_loss, compare=check_gradients)
        sample_rate = batch_size / len(rows)
        steps = math.ceil(epochs * len(rows) / batch_size)
        noise_multiplier = calibrated_noise(
            epsilon=epsilon,
            delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant=accountant,
        )
        private = system_noise_optimizer(
            _made_optimizer(own, optimizer, learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=batch_size,
        )
        batches = PoissonBatches(n_records=len(rows), sample_rate=sample_rate, steps=steps)
        noisy_steps = _fit(own, rows, truth, private, mean_loss, batches)
    plain.load_state_dict(own.state_dict())
    audit = batches.audit()
    return DPTrained(
        model=plain.eval(),
        statement=_statement(audit, noisy_steps, private, delta=delta, accountant=accountant),
        audit=audit,
    )


def _statement(
    audit: BatchAudit, noisy_steps: int, private: Any, *, delta: float, accountant: str
) -> RecordPrivacy:
    """Say what was done, not what was planned."""
    audit.require_plausible()
    if noisy_steps != audit.steps:
        raise ModelError("batches and noisy steps differ in number: no privacy claim holds")
    epsilon = spent_epsilon(
        noise_multiplier=private.noise_multiplier,
        sample_rate=audit.sample_rate,
        steps=noisy_steps,
        delta=delta,
        accountant=accountant,
    )
    return RecordPrivacy(
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=private.noise_multiplier,
        sample_rate=audit.sample_rate,
        steps=noisy_steps,
        max_grad_norm=private.max_grad_norm,
        accountant=accountant,
    )


def _check_numbers(
    rows: torch.Tensor,
    truth: torch.Tensor,
    delta: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    max_grad_norm: float,
) -> None:
    n_records = len(rows)
    if n_records < 2 or len(truth) != n_records:
        raise InvalidValueError(
            f"a training needs records with a label each, got {n_records} and {len(truth)}"
        )
    if not (isinstance(epochs, int) and epochs >= 1):
        raise InvalidValueError(f"epochs is a whole number of at least 1, got {epochs!r}")
    if not (isinstance(batch_size, int) and 1 <= batch_size <= n_records):
        raise InvalidValueError(
            f"batch_size is in [1, {n_records}], the number of records, got {batch_size!r}"
        )
    for name, value in (("learning_rate", learning_rate), ("max_grad_norm", max_grad_norm)):
        if not (math.isfinite(value) and value > 0.0):
            raise InvalidValueError(f"{name} is a positive number, got {value!r}")
    if not 0.0 < delta < 1.0 / n_records:
        raise InvalidValueError(
            f"delta is in (0, 1/{n_records}), got {delta!r}: a training that publishes one record"
            " in full, chosen by lot, keeps a larger one",
            hint=f"use delta={0.1 / n_records:.1g} or less",
        )
    if delta > 0.1 / n_records:
        warnings.warn(
            f"delta {delta:g} is above a tenth of one over the number of records",
            UserWarning,
            stacklevel=3,
        )


def _made_optimizer(
    model: torch.nn.Module, optimizer: str | MakeOptimizer, learning_rate: float
) -> torch.optim.Optimizer:
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    if callable(optimizer):
        made = optimizer(trainable, learning_rate)
    elif optimizer == "sgd":
        made = torch.optim.SGD(trainable, lr=learning_rate)
    elif optimizer == "adam":
        made = torch.optim.Adam(trainable, lr=learning_rate)
    else:
        raise InvalidValueError(
            f"no optimizer is called {optimizer[:32]!r}", hint="use 'sgd', 'adam' or a callable"
        )
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if held != {id(p) for p in trainable}:
        raise InvalidValueError(
            "the optimizer does not hold exactly the parameters that it was given",
            hint="a trainable parameter outside it would escape the clipping norm",
        )
    return made


def _fit(
    model: torch.nn.Module,
    rows: torch.Tensor,
    truth: torch.Tensor,
    private: Any,
    loss: Loss,
    batches: PoissonBatches,
) -> int:
    import torch

    hooked = optional_module("opacus", extra=EXTRA).GradSampleModule(model, loss_reduction="mean")
    hooked.forbid_grad_accumulation()
    noisy_steps = 0

    def count(_: object) -> None:
        nonlocal noisy_steps
        noisy_steps += 1

    private.attach_step_hook(count)  # runs after the noise, before the weights change
    for batch in batches:
        private.zero_grad()
        if len(batch):
            at = torch.from_numpy(batch).to(rows.device)
            with quiet_hooks():
                torch.autograd.backward(loss(hooked(rows[at]), truth[at]))
        else:
            # Skipping it would tell who sees the steps that no record was in the batch.
            private.set_empty_batch()
        private.step()
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise ModelError(
            "the weights did not stay finite; the records were used all the same",
            hint="use a lower learning_rate; count this training's epsilon too",
        )
    return noisy_steps

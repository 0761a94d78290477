"""Is there one gradient for each record? Asked before any epsilon is spent.

opacus' own validator knows layers by their type. It passes models that fail in the first
step, and models whose records influence each other, for which clipping each record's
gradient bounds nothing. So a few records make a step on a copy of the model, and their
gradients are compared with those that each record has alone.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import ModelError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.training.record_privacy import EXTRA

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

__all__ = ["check_per_record_gradients", "quiet_hooks", "supported"]

_N_RECORDS: Final = 4

_POSITIONS_HINT: Final = (
    "give every record its own row of ids: wrap the model in with_explicit_positions, or"
    " freeze these parameters"
)

_DOC: Final = "see docs/how-to/dp-trained-model.md"


@contextlib.contextmanager
def quiet_hooks() -> Iterator[None]:
    """Hide torch's warning about backward hooks of a first layer; opacus handles the case."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def supported(model: torch.nn.Module, *, fix_layers: bool) -> torch.nn.Module:
    """Return a copy of the model in training mode, all of whose layers opacus supports.

    Parameters
    ----------
    model : torch.nn.Module
    fix_layers : bool
        Replace unsupported layers by their nearest supported kin.

    Raises
    ------
    ModelError
        Naming the unsupported layers, or if nothing is trainable.
    MissingExtraError
        Without the extra ``dp-training``.
    """
    import torch

    validator = optional_module("opacus.validators", extra=EXTRA).ModuleValidator
    own = copy.deepcopy(model).train()
    if fix_layers:
        own = validator.fix(own).train()
    if not any(p.requires_grad for p in own.parameters()):
        raise ModelError("no parameter of the model is trainable", hint="set requires_grad")
    # Its check of frozen layers is missing: their running statistics learn from records.
    normalising = torch.nn.modules.batchnorm._BatchNorm
    mixing = [type(m).__name__ for m in own.modules() if isinstance(m, normalising)]
    if mixing:
        raise ModelError(
            f"{mixing[0]} mixes the records of a batch, so that no record has a gradient of its"
            " own",
            hint="use torch.nn.GroupNorm in its place, or fix_layers=True to have it replaced"
            " (its weights and statistics are lost)",
        )
    problems = validator.validate(own, strict=False)
    if problems:
        kinds = sorted({type(problem).__name__ for problem in problems})
        raise ModelError(
            f"the model has {len(problems)} layers without per-record gradients"
            f" ({', '.join(kinds)})",
            hint=f"fix_layers=True replaces LSTM, GRU and attention by opacus' own; {_DOC}",
        )
    return own


def check_per_record_gradients(
    model: torch.nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    loss: Loss,
    *,
    compare: bool,
) -> None:
    """Make one step's gradients on a copy, and compare them with those of single records.

    Parameters
    ----------
    model : torch.nn.Module
        As `supported` returned it.
    inputs, labels : torch.Tensor
        Training records; the first four are used. They decide on an error or none, and
        nothing else.
    loss : callable
    compare : bool
        False leaves out the comparison, not the step.

    Raises
    ------
    ModelError
        If a layer fails, if a parameter has not one gradient a record, if buffers change,
        or if records influence each other.
    """
    import torch

    sampler = optional_module("opacus", extra=EXTRA).GradSampleModule
    trial = copy.deepcopy(model)
    for module in trial.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    rows, truth = inputs[:_N_RECORDS], labels[:_N_RECORDS]
    # Taken first: opacus leaves attributes behind that do not survive its hooks.
    alone = _gradients_alone(trial, rows, truth, loss) if compare else None
    before = {name: buffer.clone() for name, buffer in trial.named_buffers()}
    try:
        with quiet_hooks():
            hooked = sampler(trial, loss_reduction="mean")
            torch.autograd.backward(loss(hooked(rows), truth))
    except Exception as exc:
        raise ModelError(
            f"a trial step failed with {type(exc).__name__}: a layer has no per-record gradients",
            hint=f"freeze the layer, or replace it; {_DOC}",
        ) from exc
    after = dict(trial.named_buffers())
    if any(not torch.equal(before[name], after[name]) for name in before):
        raise ModelError(
            "the model changes its buffers in training, without clipping and noise",
            hint="remove layers that keep running statistics",
        )
    together = {name: _per_record(name, p) for name, p in _trainable(trial)}
    for name, gradient in together.items():
        if len(gradient) != len(rows):
            raise ModelError(
                f"{name} has {len(gradient)} gradients for {len(rows)} records",
                hint=_POSITIONS_HINT,
            )
    if alone is not None:
        _require_equal(together, alone)


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _per_record(name: str, parameter: Any) -> torch.Tensor:
    gradient = getattr(parameter, "grad_sample", None)
    if isinstance(gradient, list):
        raise ModelError(f"{name} is used in more than one pass of a step")
    if gradient is None:
        raise ModelError(
            f"{name} has no gradient: the loss does not depend on it",
            hint="freeze it with requires_grad_(False)",
        )
    found: torch.Tensor = gradient
    return found


def _gradients_alone(
    model: torch.nn.Module, rows: torch.Tensor, truth: torch.Tensor, loss: Loss
) -> dict[str, torch.Tensor]:
    import torch

    try:
        twice = [float(loss(model(rows), truth).detach()) for _ in range(2)]
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name, _ in _trainable(model)}
        for i in range(len(rows)):
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(loss(model(rows[i : i + 1]), truth[i : i + 1]))
            for name, p in _trainable(model):
                gradients[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    except Exception as exc:
        raise ModelError(
            f"a trial step failed with {type(exc).__name__}",
            hint="are inputs, labels and loss those of this model?",
        ) from exc
    if twice[0] != twice[1]:
        raise ModelError(
            "the model is random in training mode, so that its gradients cannot be checked",
            hint="set its dropout to 0, or pass check_gradients=False",
        )
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(found) for name, found in gradients.items()}


def _require_equal(together: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    import torch

    overall = max(float(g.norm()) for g in alone.values())
    for name, expected in alone.items():
        # Rounding differs between the two ways by a few units; a wrong factor by its size.
        tolerance = 10.0 * torch.finfo(expected.dtype).eps ** 0.5
        gap = float((together[name] - expected).norm())
        if not gap <= tolerance * (float(expected.norm()) + 1e-3 * overall):
            raise ModelError(
                f"the gradients of single records in a batch are not those of the records alone"
                f" (first seen at {name})",
                hint="records must not influence each other in model or loss, and the loss is the"
                f" mean over the batch, not the sum; {_DOC}",
            )

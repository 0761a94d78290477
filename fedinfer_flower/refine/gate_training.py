"""Train a receiver's gate from evidence and losses; no language model is needed here.

The network learns to choose the option of least expected loss, the own answer being one
option and asking having a price. A guard around it is calibrated on questions that the
network has not seen; see `refine.gate_calibration` for what that guarantees.

Axes: N questions, J sharers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.gate import usable
from fedinfer_flower.kv.gates.learned import GateNetwork, LearnedGate, LearnedGateSpec
from fedinfer_flower.refine.gate_calibration import (
    GateExamples,
    GateReport,
    assess_gate,
    harm_bound,
    least_questions,
)

__all__ = ["GateCard", "GateTrainingOptions", "MarginTrial", "TrainedGate", "train_gate"]

_LARGEST_LOSS: Final = 6.0
"""A hopeless option is hopeless; how hopeless must not drown the close calls."""
_MARGINS: Final = 64
_LEAST_SURE: Final = 20


@dataclass(frozen=True, kw_only=True)
class GateTrainingOptions:
    """How a gate is trained and how much harm it may do.

    Parameters
    ----------
    steps : int
    learning_rate, weight_decay : float
        The decay is strong: with a weak one the network is sure of everything after some
        hundred steps, its log-odds no longer tell close calls apart, and margins are coarse.
    width : int
        Of the network.
    absence : float
        Share of sharers hidden at each step. A gate that always saw all sharers never
        asks when one is late.
    cost : float
        Loss that asking costs: ties go to the own answer.
    holdout : float
        Share of each task's questions kept for calibration.
    allowed_harm : float
        Most harm on any task, with `confidence`.
    confidence : float
    own_precision : float
        The own answer is taken at once only where it is right at least this often.
    own_abstention : float
        ... and where the receiver abstains with at most this probability.
    seed : int
    """

    steps: int = 400
    learning_rate: float = 1e-2
    weight_decay: float = 0.3
    width: int = 32
    absence: float = 0.3
    cost: float = 0.05
    holdout: float = 0.4
    allowed_harm: float = 0.05
    confidence: float = 0.95
    own_precision: float = 0.95
    own_abstention: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        inside = ("holdout", "allowed_harm", "confidence")
        for name in (*inside, "absence", "own_precision", "own_abstention"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0 or (name in inside and value in (0.0, 1.0)):
                raise InvalidValueError(f"{name} of a gate's training is a share")
        if self.absence == 1.0:
            raise InvalidValueError("absence of a gate's training is below 1")
        if self.steps < 1 or not (self.learning_rate > 0.0 and self.weight_decay >= 0.0):
            raise InvalidValueError("a gate's training takes steps of a positive size")
        if not (math.isfinite(self.cost) and self.cost >= 0.0):
            raise InvalidValueError("cost of a gate's training is not negative")


@dataclass(frozen=True, kw_only=True)
class MarginTrial:
    """What one margin would reach on the held-out questions.

    Parameters
    ----------
    margin : float
    harm_bound : float
        Largest upper bound over tasks.
    accuracy : float
        Mean over tasks.
    """

    margin: float
    harm_bound: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class GateCard:
    """What is to be known of a trained gate.

    Parameters
    ----------
    receiver : str
        Model digest; empty if not given.
    sharers : tuple of str
        Model digests of the sharers that it was trained with; it takes any number.
    data_sha256 : str
        Of the training tensors.
    options : GateTrainingOptions
    seconds : float
        Processor time.
    margin, own_probability : float, optional
        The guard; None for "nobody" and "never".
    held_out : GateReport
        On the questions that chose the margin. Its bounds of harm hold for the margin
        chosen; accuracy and regret are a little flattered by the choice.
    frontier : tuple of MarginTrial
        All margins from strict to loose: what more `allowed_harm` would buy.
    harm_with_one_absent : float
        Largest harm on any task when any one sharer is absent; 0 with a single sharer.
    """

    receiver: str = ""
    sharers: tuple[str, ...] = ()
    data_sha256: str
    options: GateTrainingOptions
    seconds: float
    margin: float | None
    own_probability: float | None
    held_out: GateReport
    frontier: tuple[MarginTrial, ...] = field(repr=False)
    harm_with_one_absent: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        lists = {
            "sharers": list(self.sharers),
            "frontier": [asdict(trial) for trial in self.frontier],
        }
        return asdict(self) | lists


@dataclass(frozen=True, eq=False)
class TrainedGate:
    """A gate with its card."""

    gate: LearnedGate
    card: GateCard = field(repr=False)


def train_gate(
    examples: GateExamples,
    options: GateTrainingOptions | None = None,
    *,
    receiver: str = "",
    sharers: Sequence[str] = (),
) -> TrainedGate:
    """Train and calibrate a gate.

    Parameters
    ----------
    examples : GateExamples
        New to the fusers. A part of each task, `options.holdout`, only calibrates.
    options : GateTrainingOptions, optional
    receiver : str
        Model digest of the receiver, for the card.
    sharers : sequence of str
        Model digests, for the card.

    Returns
    -------
    trained : TrainedGate
        If no margin gains anything and keeps harm within its limit, the gate always takes
        the own answer, and its card says so (`margin` is None).

    Raises
    ------
    InvalidValueError
        If a task has too few questions for the bound that was asked for.

    Notes
    -----
    *Privacy.* The gate is a function of public training questions: use no private ones, its
    weights and card travel with it.

    Examples
    --------
    >>> from fedinfer_flower.refine.gate_calibration import GateExamples
    >>> n = 400
    >>> knows = torch.arange(n) % 2 == 0     # the receiver knows every other answer
    >>> def of(sure):
    ...     sure = sure.float()[:, None]
    ...     return torch.cat([0.4 + 0.5 * sure, 2 - sure, 0.1 + sure / 2, 0.8 - 0.8 * sure], 1)
    >>> right = torch.stack([knows, ~knows], 1)
    >>> trained = train_gate(GateExamples(
    ...     own=of(knows), sharers=of(~knows)[:, None], losses=4.0 * ~right, correct=right,
    ...     tasks=tuple("own" if k else "fact" for k in knows)))
    >>> round(trained.card.held_out.gate, 6), trained.card.held_out.worst_harm
    (1.0, 0.0)
    """
    options = options or GateTrainingOptions()
    start = time.process_time()
    fit, held_out = _split(examples, options)
    network = _fit(fit, options)
    spec = LearnedGateSpec(
        width=options.width,
        own_probability=_own_threshold(fit, options),
        own_abstention=options.own_abstention,
        uses_agreement=examples.agreement is not None,
    )
    trials = _trials(LearnedGate(spec, network), fit, held_out, options)
    right_alone = float((held_out.weights() * held_out.correct[:, 0]).sum())
    margin = _margin(trials, options.allowed_harm, right_alone)
    gate = LearnedGate(replace(spec, margin=margin), network)
    n_sharers = examples.present.shape[1]
    absent = [
        assess_gate(gate, held_out.without(j), confidence=options.confidence).worst_harm
        for j in range(n_sharers if n_sharers > 1 else 0)
    ]
    card = GateCard(
        receiver=receiver,
        sharers=tuple(sharers),
        data_sha256=_digest(examples),
        options=options,
        seconds=time.process_time() - start,
        margin=margin,
        own_probability=spec.own_probability,
        held_out=assess_gate(gate, held_out, confidence=options.confidence),
        frontier=trials,
        harm_with_one_absent=max(absent, default=0.0),
    )
    return TrainedGate(gate, card)


def _split(
    examples: GateExamples, options: GateTrainingOptions
) -> tuple[GateExamples, GateExamples]:
    """Return questions to fit and questions held out, of each task the same share."""
    least = least_questions(options.allowed_harm, options.confidence)
    shuffle = torch.Generator().manual_seed(options.seed)
    fit: list[int] = []
    held: list[int] = []
    for task, rows in examples.rows_of().items():
        kept = math.floor(options.holdout * len(rows))
        if kept < least or kept == len(rows):
            raise InvalidValueError(
                f"task {task[:64]!r} has {kept} held-out questions; to bound harm by"
                f" {options.allowed_harm:g} takes {least}",
                hint=f"give {math.ceil(least / options.holdout)} questions of each task,"
                " hold out more, or allow more harm",
            )
        order = [rows[i] for i in torch.randperm(len(rows), generator=shuffle).tolist()]
        held += order[:kept]
        fit += order[kept:]
    return examples.select(sorted(fit)), examples.select(sorted(held))


def _fit(fit: GateExamples, options: GateTrainingOptions) -> GateNetwork:
    """Minimise the expected loss of the network's choice, each task weighing the same."""
    seen = usable(fit.own, fit.sharers, fit.present, fit.agreement)
    own = fit.own.float()
    sharers = torch.where(seen[..., None], fit.sharers.float(), 0.0)
    losses = fit.losses.float().clamp(0.0, _LARGEST_LOSS)
    losses = torch.cat([losses[:, :1], losses[:, 1:] + options.cost], 1)
    weights = fit.weights().float()
    chance = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = GateNetwork(options.width)
    everybody = torch.cat([own, sharers[seen]])
    network.mean.copy_(everybody.mean(0))
    network.scale.copy_(everybody.std(0).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    for _ in range(options.steps):
        present = seen & (torch.rand(seen.shape, generator=chance) >= options.absence)
        scores = network(own, sharers, _hidden(fit.agreement, chance, options))
        scores = scores.masked_fill(~present, -1e4)
        choice = torch.cat([torch.zeros(len(own), 1), scores], 1).softmax(1)
        loss = ((choice * losses).sum(1) * weights).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def _hidden(
    agreement: Tensor | None, chance: torch.Generator, options: GateTrainingOptions
) -> Tensor | None:
    """Hide the agreement of some questions, so that the gate also works without it."""
    if agreement is None:
        return None
    gone = torch.rand((len(agreement), 1), generator=chance) < options.absence
    return agreement.float().masked_fill(gone, -1.0)


def _own_threshold(fit: GateExamples, options: GateTrainingOptions) -> float | None:
    """Return the least probability from which on the receiver's own answer is reliable.

    The network has no part in it, so the questions that fitted the network are as good as
    any; the held-out ones stay untouched for the margin, and check the result.
    """
    sure = fit.own[:, 3] <= options.own_abstention
    order = fit.own[sure, 0].float().argsort(descending=True)
    probability = fit.own[sure, 0].float()[order]
    weights = fit.weights()[sure][order]
    right = fit.correct[sure, 0].double()[order]
    precision = (weights * right).cumsum(0) / weights.cumsum(0).clamp_min(1e-12)
    last = torch.ones_like(probability, dtype=torch.bool)
    last[:-1] = probability[:-1] > probability[1:]  # a threshold cannot split equals
    good = last & (precision >= options.own_precision)
    good[: _LEAST_SURE - 1] = False
    if not bool(good.any()):
        return None
    return float(probability[int(good.nonzero()[-1])])


def _trials(
    gate: LearnedGate, fit: GateExamples, held_out: GateExamples, options: GateTrainingOptions
) -> tuple[MarginTrial, ...]:
    """Return what each margin reaches, from strict to loose.

    The margins come from the questions that fitted the network: a test is only fixed in
    advance if its steps do not depend on the data that it is made on.
    """
    ladder = _scores(gate, fit).max(1).values
    ladder = ladder[ladder > 0.0].double()
    if not len(ladder):
        return ()
    steps = torch.linspace(1.0, 0.0, _MARGINS, dtype=torch.float64)
    margins = sorted({0.0, *ladder.quantile(steps).tolist()}, reverse=True)
    scores = _scores(gate, held_out)
    return tuple(
        MarginTrial(
            margin=margin,
            harm_bound=harm_bound(held_out, scores, margin, options.confidence),
            accuracy=assess_gate(
                LearnedGate(replace(gate.spec, margin=margin), gate.network), held_out
            ).gate,
        )
        for margin in margins
    )


def _margin(trials: Sequence[MarginTrial], allowed_harm: float, right_alone: float) -> float | None:
    """Return the margin of best accuracy before the first that harms too much."""
    passed = itertools.takewhile(lambda t: t.harm_bound <= allowed_harm, trials)
    better = [trial for trial in passed if trial.accuracy > right_alone]
    # Of equal ones the strictest, which comes first.
    return max(better, key=lambda t: t.accuracy).margin if better else None


def _scores(gate: LearnedGate, examples: GateExamples) -> Tensor:
    seen = usable(examples.own, examples.sharers, examples.present, examples.agreement)
    sharers = torch.where(seen[..., None], examples.sharers.float(), 0.0)
    agreement = None if examples.agreement is None else examples.agreement.float()
    return gate.log_odds(examples.own.float(), sharers, seen, agreement)


def _digest(examples: GateExamples) -> str:
    digest = hashlib.sha256("\0".join(examples.tasks).encode())
    for tensor in (examples.own, examples.sharers, examples.losses, examples.correct):
        digest.update(tensor.detach().double().contiguous().numpy().tobytes())
    return digest.hexdigest()

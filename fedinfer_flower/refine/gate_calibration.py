"""Margins of a learned gate, chosen on held-out questions, and what the gate reaches there.

*Harm* is the share of a task's questions that the receiver alone has right and that the
gate's choice has wrong. Bounding harm bounds the loss against the own answer on every task,
and so on every mix of tasks.

The margin is found by fixed-sequence testing: margins are tried from strict to loose, each
must keep the exact binomial upper bound of harm below the limit on *every* task, and the
first that fails ends the search. The chance that any accepted margin harms some task more
than the limit is then at most one minus the confidence, without a correction for the number
of margins tried (Angelopoulos et al., *Learn then Test*, arXiv 2110.01052, section 2.2).
The bound is for questions drawn like the held-out ones.

Axes: N questions, J sharers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.kv.gate import Gate, usable

__all__ = [
    "GateExamples",
    "GateReport",
    "TaskReport",
    "assess_gate",
    "binomial_upper_bound",
    "harm_bound",
    "least_questions",
]

_NORMAL_95 = 1.645


@dataclass(frozen=True, eq=False, kw_only=True)
class GateExamples:
    """Questions with known answers, as a gate sees them.

    They must be new to the fusers: where a fuser was trained on them, every sharer looks
    better than it is, and the gate learns never to choose the own answer.

    Parameters
    ----------
    own : float tensor (N, 4)
    sharers : float tensor (N, J, 4)
        Evidence as `language.confidence.evidence` returns it.
    losses : float tensor (N, 1 + J)
        Loss of the right answer with the own cache, then with each sharer's alone.
    correct : bool tensor (N, 1 + J)
        Whether the answer is right. Where nobody can answer, abstaining is right.
    tasks : tuple of str
        Kind of each question, such as ``"own"``, ``"nobody"``, ``"fact"``. Each counts the
        same. There should be one that nobody can answer.
    available : tensor (N, J), optional
        Default all.
    agreement : float tensor (N, J), optional
    """

    own: Tensor = field(repr=False)
    sharers: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    correct: Tensor = field(repr=False)
    tasks: tuple[str, ...] = field(repr=False)
    available: Tensor | None = field(default=None, repr=False)
    agreement: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n, j = self.present.shape
        usable(self.own, self.sharers, self.present, self.agreement)
        if not (tuple(self.losses.shape) == tuple(self.correct.shape) == (n, 1 + j)):
            raise ShapeError("losses and correct of a gate's examples have shape (N, 1 + J)")
        if len(self.tasks) != n or j < 1:
            raise ShapeError("a gate's examples have one task a question, and a sharer")
        if not bool(torch.isfinite(self.losses).all()):
            raise InvalidValueError("losses of a gate's examples are finite")

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def present(self) -> Tensor:
        """Availability (N, J), all where it was not given."""
        return torch.ones(self.sharers.shape[:2]) if self.available is None else self.available

    def select(self, rows: Sequence[int]) -> GateExamples:
        """Return some of the questions."""
        at = torch.as_tensor(list(rows), dtype=torch.long)
        return GateExamples(
            own=self.own[at],
            sharers=self.sharers[at],
            losses=self.losses[at],
            correct=self.correct[at],
            tasks=tuple(self.tasks[i] for i in at.tolist()),
            available=self.present[at],
            agreement=None if self.agreement is None else self.agreement[at],
        )

    def without(self, sharer: int) -> GateExamples:
        """Return the same questions with one sharer absent."""
        available = self.present.clone()
        available[:, sharer] = 0
        return replace(self, available=available)

    def rows_of(self) -> dict[str, list[int]]:
        """Return the questions of each task, tasks in order of their names."""
        found: dict[str, list[int]] = {}
        for row, task in enumerate(self.tasks):
            found.setdefault(task, []).append(row)
        return dict(sorted(found.items()))

    def weights(self) -> Tensor:
        """Return float64 weights (N,) that sum to 1 and give each task the same."""
        rows = self.rows_of()
        each = [1.0 / (len(rows) * len(rows[task])) for task in self.tasks]
        return torch.tensor(each, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What a gate reaches on one task; shares of its questions.

    Parameters
    ----------
    questions : int
    own : float
        Right with the own answer alone.
    best_fixed : float
        Right with the best choice of this task alone: always own, or always one sharer.
    gate : float
        Right with the gate.
    used : float
        Questions for which a sharer was fused.
    asked : float
        Questions for which the own answer was not taken at once.
    harm, harm_bound : float
        Own right and gate wrong; and its exact upper bound.
    """

    questions: int
    own: float
    best_fixed: float
    gate: float
    used: float
    asked: float
    harm: float
    harm_bound: float


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What a gate reaches on a set of questions; each task counts the same.

    Parameters
    ----------
    tasks : dict of str to TaskReport
    own, gate : float
        Mean over tasks.
    best_fixed : float
        The best single choice for all tasks together.
    best_fixed_choice : int
        0 for own, 1 + j for sharer j.
    regret, regret_bound : float
        What the gate loses against that choice (negative: it gains), and an approximate
        95 % upper bound (normal).
    worst_regret : float
        Largest loss on any task against the best choice *of that task*. No mix of these
        tasks can lose more against its own best fixed choice.
    worst_harm, worst_harm_bound : float
        Largest over tasks.
    confidence : float
        Of each task's bound of harm.
    """

    tasks: dict[str, TaskReport]
    own: float
    gate: float
    best_fixed: float
    best_fixed_choice: int
    regret: float
    regret_bound: float
    worst_regret: float
    worst_harm: float
    worst_harm_bound: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def assess_gate(gate: Gate, examples: GateExamples, *, confidence: float = 0.95) -> GateReport:
    """Measure a gate that fuses at most one sharer.

    A sharer that is not available counts, as a fixed choice, as the own answer.

    Raises
    ------
    InvalidValueError
        If the gate fuses several sharers: what they reach together is not in `examples`.
    """
    chosen = gate.choose(examples.own, examples.sharers, examples.present, examples.agreement)
    if bool((chosen.sum(1) > 1).any()):
        raise InvalidValueError(
            "a gate that fuses several sharers cannot be measured by each one's answers",
            hint="measure it by answering the questions: refine.evaluation",
        )
    right = _right(examples)
    used = chosen.sum(1) > 0
    got = right.gather(1, torch.where(used, 1 + chosen.argmax(1), 0)[:, None]).squeeze(1)
    asked = ~gate.own_suffices(examples.own)
    tasks = {}
    for task, rows in examples.rows_of().items():
        n, mine, ours = len(rows), right[rows, 0], got[rows]
        harmed = int((mine & ~ours).sum())
        tasks[task] = TaskReport(
            questions=n,
            own=_share(mine),
            best_fixed=float(right[rows].double().mean(0).max()),
            gate=_share(ours),
            used=_share(used[rows]),
            asked=_share(asked[rows]),
            harm=harmed / n,
            harm_bound=binomial_upper_bound(harmed, n, confidence=confidence),
        )
    return _report(tasks, examples, right, got, confidence)


def _report(
    tasks: dict[str, TaskReport],
    examples: GateExamples,
    right: Tensor,
    got: Tensor,
    confidence: float,
) -> GateReport:
    weights = examples.weights()
    gate = float((got.double() * weights).sum())
    fixed = (right.double() * weights[:, None]).sum(0)
    lead = right.double() - got.double()[:, None]
    variance = torch.zeros_like(fixed)
    for rows in examples.rows_of().values():
        variance += lead[rows].var(0, unbiased=False) / (len(rows) * len(tasks) ** 2)
    regret = fixed - gate
    return GateReport(
        tasks=tasks,
        own=float(fixed[0]),
        gate=gate,
        best_fixed=float(fixed.max()),
        best_fixed_choice=int(fixed.argmax()),
        regret=float(regret.max()),
        regret_bound=float((regret + _NORMAL_95 * variance.sqrt()).max()),
        worst_regret=max(t.best_fixed - t.gate for t in tasks.values()),
        worst_harm=max(t.harm for t in tasks.values()),
        worst_harm_bound=max(t.harm_bound for t in tasks.values()),
        confidence=confidence,
    )


def harm_bound(examples: GateExamples, scores: Tensor, margin: float, confidence: float) -> float:
    """Return the largest upper bound of harm over tasks at one margin.

    Parameters
    ----------
    examples : GateExamples
    scores : float tensor (N, J)
        ``LearnedGate.log_odds``.
    margin : float
    confidence : float
    """
    right = _right(examples)
    best = scores.max(1)
    option = torch.where(best.values > margin, 1 + best.indices, 0)
    harmed = right[:, 0] & ~right.gather(1, option[:, None]).squeeze(1)
    return max(
        binomial_upper_bound(int(harmed[rows].sum()), len(rows), confidence=confidence)
        for rows in examples.rows_of().values()
    )


def binomial_upper_bound(count: int, total: int, *, confidence: float) -> float:
    """Return the exact (Clopper-Pearson) upper bound of a share.

    Examples
    --------
    >>> round(binomial_upper_bound(0, 100, confidence=0.95), 4)
    0.0295
    """
    if not (0 <= count <= total and total > 0 and 0.0 < confidence < 1.0):
        raise InvalidValueError("a bound needs 0 <= count <= total and confidence in (0, 1)")
    if count == total:
        return 1.0
    low, high = count / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        if _at_most(count, total, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def least_questions(limit: float, confidence: float) -> int:
    """Return the fewest questions of a task with which a bound below `limit` is possible.

    Examples
    --------
    >>> least_questions(0.05, 0.95)
    59
    """
    return math.ceil(math.log(1.0 - confidence) / math.log(1.0 - limit))


def _at_most(count: int, total: int, share: float) -> float:
    """Return the chance of at most `count` of `total`."""
    if share >= 1.0:
        return 0.0
    if share <= 0.0:
        return 1.0
    yes, no = math.log(share), math.log1p(-share)
    whole = math.lgamma(total + 1)
    return math.fsum(
        math.exp(
            whole - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * yes + (total - k) * no
        )
        for k in range(count + 1)
    )


def _right(examples: GateExamples) -> Tensor:
    right = examples.correct.bool().clone()
    # Who is absent cannot be chosen, neither by a gate nor by a fixed rule.
    absent = examples.present <= 0
    right[:, 1:] = torch.where(absent, right[:, :1], right[:, 1:])
    return right


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())

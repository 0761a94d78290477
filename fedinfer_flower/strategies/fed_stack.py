"""`FedStack`: train an aggregator on all sites' held-out answers, and give it to the sites."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid

from fedinfer_flower.ensemble.base import Array, EnsembleRule, make_rule
from fedinfer_flower.ensemble.fitted import FittedAggregator, remember
from fedinfer_flower.ensemble.stack_participation import Participation, check_participation
from fedinfer_flower.ensemble.stack_shapes import KINDS, start_arrays
from fedinfer_flower.errors import FedInferError, InvalidValueError, NotEnoughNodesError
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.query import Deadline
from fedinfer_flower.strategies.onboarding import onboard, wait_for_nodes
from fedinfer_flower.strategies.stack_exchange import StackExchange
from fedinfer_flower.strategies.stack_trainer import StackGrid, TrainerOptions, run_rounds
from fedinfer_flower.wire.directory import Directory, SiteCard
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, WireLimits
from fedinfer_flower.wire.stack_messages import StackJob

__all__ = ["FedStack", "StackResult"]

log = logging.getLogger("fedinfer_flower.coordinator")

_MAX_HIDDEN = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class StackResult:
    """A fitted aggregator, and how it came about.

    Parameters
    ----------
    fitted : FittedAggregator
        Known in this process from now on.
    history : mapping of int to float
        Mean loss over all held-out rows before each round.
    participation : Participation, optional
        The sites' parts of the sum; None for kinds that work on single scores.
    refused : mapping of str to FedInferError
        Sites that do not use it, by name.
    seconds : float
    """

    fitted: FittedAggregator
    history: Mapping[int, float]
    participation: Participation | None
    refused: Mapping[str, FedInferError]
    seconds: float

    @property
    def rule(self) -> EnsembleRule:
        """The rule that uses it, for `FedEnsemble(rule=...)`."""
        return make_rule(self.fitted.kind, {"stack": self.fitted.digest})

    def save(self, folder: Path) -> None:
        """Write the aggregator and its card, for the querier."""
        self.fitted.save(folder)

    def summary(self) -> str:
        """Return a tree of what was trained."""
        card, losses = self.fitted.card, list(self.history.values())
        lines = [
            f"{self.fitted.kind} {self.fitted.digest[:16]}",
            f"├── trained: {card['trainer']}, {card['rounds']} rounds in {self.seconds:.1f} s",
            f"├── held-out rows of {len(card['sites'])} sites together: {card['rows']}",
            f"├── loss: {losses[0]:.3f} before the first round, {losses[-1]:.3f} before the last",
        ]
        if self.participation is not None:
            lines.append(
                f"├── part of the sum: at most {self.participation.share_k.max():.0%} a site,"
                f" {self.participation.direction_k.max():.0%} in any direction"
            )
        refused = ", ".join(sorted(self.refused)) or "none"
        return "\n".join([*lines, f"└── sites that refuse it: {refused}"])


class FedStack:
    """Train a stacked aggregator with Flower's own strategies.

    No model and no label leaves a site. Held-out inputs travel sealed to the other sites,
    whose answers come back sealed to the owner of the rows; each site then trains the
    aggregator's few parameters on its own rows, and Flower averages.

    Parameters
    ----------
    kind : {"linear-stack", "deep-set", "gated-mixture", "mlp-stack"}
        The rule that the aggregator is for.
    trainer : {"FedAdam", "FedAvg"}
    rounds : int
    options : TrainerOptions, optional
        In place of `trainer` and `rounds`, with all that can be set.
    hidden : int
        Width of hidden layers.
    classes : sequence of str, optional
        Label space; default the union of the sites' classes.
    leave_out : collection of str
        Names of sites that do not take part. One that does not consent ends the training
        with its typed error otherwise.
    deadline : Deadline
        Seconds of one step, and fewest sites that must have held-out rows.
    min_available_nodes : int
        Nodes to wait for; with 0, until no more are joining.
    patience_s : float
    seed : int
        Of the starting weights.
    limits : WireLimits

    Raises
    ------
    InvalidValueError
        When built, for an option out of its range.

    Privacy
    -------
    *Peers* read this site's held-out inputs, and *the owner of rows* each site's own
    calibrated answers to them, in clear. *The coordinator* reads gradients, the loss and the
    number of held-out rows of each site in each round, and the fitted aggregator: functions
    of the held-out labels. The gradient of a bias is mean prediction less class frequency,
    so it shows about how often each class comes among a site's held-out rows, and gradients
    of few rows can show single labels. It reads no rows and no answers.
    A peer together with the coordinator learns what both do: the peers' rows, their
    gradients, and all answers to the peer's own rows. Nobody but the site reads its labels.

    Not done: secure aggregation of the gradients, noise on them, and defence against a site
    that sends false gradients (it has the weight of the rows that it says it has). Sites
    that collude can hold out rows of their choice.

    Examples
    --------
    >>> print(FedStack(kind="linear-stack", rounds=20).summary())
    FedStack
    ├── kind: linear-stack
    ├── trainer: FedAdam, 20 rounds
    └── deadline of one step: 60 s
    """

    def __init__(
        self,
        kind: str = "linear-stack",
        *,
        trainer: str = "FedAdam",
        rounds: int = 40,
        options: TrainerOptions | None = None,
        hidden: int = 32,
        classes: Collection[str] | None = None,
        leave_out: Collection[str] = (),
        deadline: Deadline | None = None,
        min_available_nodes: int = 0,
        patience_s: float = 60.0,
        seed: int = 0,
        limits: WireLimits = DEFAULT_LIMITS,
    ) -> None:
        if kind not in KINDS:
            raise InvalidValueError(f"no kind of stack {kind!r}", hint=f"kinds: {', '.join(KINDS)}")
        if not 1 <= hidden <= _MAX_HIDDEN:
            raise InvalidValueError(f"hidden is in [1, {_MAX_HIDDEN}]")
        self.kind = kind
        self.options = options or TrainerOptions(trainer=trainer, rounds=rounds)
        self.hidden = hidden
        self.classes = None if classes is None else tuple(str(c) for c in classes)
        if self.classes is not None and len(set(self.classes)) != max(len(self.classes), 2):
            raise InvalidValueError("classes are at least two, and none twice")
        self.leave_out = frozenset(leave_out)
        self.deadline = deadline or Deadline()
        self.min_available_nodes = min_available_nodes
        self.patience_s = patience_s
        self.seed = seed
        self.limits = limits

    def start(self, grid: Grid) -> StackResult:
        """Exchange answers, train, and give the aggregator to the sites.

        Raises
        ------
        NotEnoughNodesError
            If fewer than two sites take part, or too few have held-out rows.
        ProtectionRefusedError
            If what was trained would show one site's answers; see `stack_participation`.
        FedInferError
            The typed error of a site that does not take part.
        """
        started = time.monotonic()
        cards = self._onboard(grid)
        directory = Directory(run_id=int(grid.run.run_id), cards=tuple(cards.values()))
        job = StackJob(
            job_id=secrets.token_hex(16),
            classes=self.classes or shared_classes({n: c.profile for n, c in cards.items()}),
            directory=directory,
        )
        exchange = StackExchange(
            grid=grid,
            job=job,
            cards=cards,
            timeout_s=self.deadline.timeout_s,
            limits=self.limits,
        )
        rows = exchange.exchange()
        if len(rows) < self.deadline.quorum:
            raise NotEnoughNodesError(
                f"{len(rows)} sites have held-out rows, {self.deadline.quorum} are needed",
                hint="give LocalModel(holdout=...) at the sites",
            )
        fitted, history = self._train(grid, job, rows)
        participation = check_participation(fitted)
        refused = exchange.install(fitted.to_bytes())
        for error in refused.values():
            log.warning("%s", error)
        remember(fitted)
        return StackResult(
            fitted=fitted,
            history=history,
            participation=participation,
            refused={cards[n].profile.name: error for n, error in refused.items()},
            seconds=time.monotonic() - started,
        )

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        return "\n".join(
            [
                "FedStack",
                f"├── kind: {self.kind}",
                f"├── trainer: {self.options.trainer}, {self.options.rounds} rounds",
                f"└── deadline of one step: {self.deadline.timeout_s:g} s",
            ]
        )

    def _onboard(self, grid: Grid) -> dict[int, SiteCard]:
        node_ids = wait_for_nodes(
            grid,
            at_least=self.min_available_nodes or 2,
            patience_s=self.patience_s,
            settle_s=0.0 if self.min_available_nodes else 0.5,
        )
        onboarded = onboard(
            grid,
            node_ids,
            run_id=int(grid.run.run_id),
            timeout_s=self.deadline.timeout_s,
            limits=self.limits,
        )
        cards = {n: c for n, c in onboarded.cards.items() if c.profile.name not in self.leave_out}
        if len(cards) < 2:
            raise NotEnoughNodesError(f"{len(cards)} sites take part, 2 are needed")
        return cards

    def _train(
        self, grid: Grid, job: StackJob, rows: Mapping[int, int]
    ) -> tuple[FittedAggregator, dict[int, float]]:
        arrays = start_arrays(
            self.kind,
            n_sites=len(job.key_ids),
            n_classes=len(job.classes),
            hidden=self.hidden,
            seed=self.seed,
        )
        rounds_grid = StackGrid(
            grid,
            node_ids=rows,
            shapes={name: array.shape for name, array in arrays.items()},
            timeout_s=self.deadline.timeout_s,
        )
        trained, history = run_rounds(
            rounds_grid,
            self.kind,
            {name: np.asarray(array) for name, array in arrays.items()},
            self.options,
            job_id=job.job_id,
            timeout_s=self.deadline.timeout_s,
        )
        card = {
            "classes": list(job.classes),
            "sites": list(job.key_ids),
            "trainer": self.options.trainer,
            "rounds": self.options.rounds,
            "rows": sum(rows.values()),
        }
        return FittedAggregator(kind=self.kind, arrays=_centred(trained), card=card), history


def _centred(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the same decisions with logits that sum to zero.

    A shift of all logits decides nothing, but whoever opens the sum would read it: an
    optimiser that scales each parameter by itself lets it drift.
    """
    linear = {"weights_kcc", "bias_kc"}
    return {
        name: array - array.mean(axis=-1, keepdims=True) if name in linear else array
        for name, array in arrays.items()
    }

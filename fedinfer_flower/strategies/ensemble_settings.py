"""What `FedEnsemble` is given: checked once, when it is built."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import ConfigError
from fedinfer_flower.privacy.base import Protection, make_protection
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.query import Deadline
from fedinfer_flower.selection.base import Selector
from fedinfer_flower.selection.gates import Gate
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.settlement.forms import evidence_form
from fedinfer_flower.strategies.base import InferenceStrategy
from fedinfer_flower.strategies.choosing import Choosing, check_numbers
from fedinfer_flower.strategies.config import InferConfig
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, WireLimits

__all__ = ["EnsembleSettings"]


class EnsembleSettings(InferenceStrategy):
    """The options of `FedEnsemble`, where they are described."""

    def __init__(
        self,
        *,
        rule: str | EnsembleRule = "auto",
        protection: str | Protection = "plain",
        deadline: Deadline | None = None,
        fraction_query: float = 1.0,
        min_query_nodes: int = 1,
        max_query_nodes: int | None = None,
        selector: str | Selector | None = None,
        gates: Sequence[str | Gate] = (),
        history: SiteHistory | None = None,
        budget: float | None = None,
        evidence: bool | str = False,
        min_available_nodes: int = 0,
        patience_s: float = 60.0,
        batch_size: int = 1024,
        classes: tuple[str, ...] | list[str] | None = None,
        allow_coordinator_key: bool = False,
        limits: WireLimits = DEFAULT_LIMITS,
    ) -> None:
        self.protection = (
            make_protection(protection, {}) if isinstance(protection, str) else protection
        )
        self.rule: EnsembleRule | None
        if isinstance(rule, str):
            self.rule = None if rule == "auto" else make_rule(rule, {})
        else:
            self.rule = rule
        if self.rule is not None:
            require_legal(self.rule, self.protection)
        check_numbers(
            fraction_query=fraction_query,
            min_query_nodes=min_query_nodes,
            min_available_nodes=min_available_nodes,
            batch_size=batch_size,
            patience_s=patience_s,
            classes=classes,
        )
        self.choosing = Choosing.from_options(
            selector=selector,
            gates=gates,
            history=history,
            budget=budget,
            at_most=max_query_nodes,
            fraction=fraction_query,
            at_least=max(
                min_query_nodes, self.protection.min_cohort, (deadline or Deadline()).quorum
            ),
        )
        if self.choosing.selector is not None and self.choosing.selector.sequential:
            raise ConfigError(
                f"selector {self.choosing.selector.name!r} asks group after group",
                hint="FedSequential(selector=...) opens each group's sum and goes on",
            )
        # Sealed or not is known when asked; what is legal neither way is refused now.
        if evidence:
            evidence_form(self.protection, sealed=True)
        self.evidence = evidence
        self.fraction_query = fraction_query
        self.deadline = deadline or Deadline()
        self.min_query_nodes = min_query_nodes
        self.min_available_nodes = min_available_nodes
        self.patience_s = patience_s
        self.batch_size = batch_size
        self.classes = None if classes is None else tuple(str(c) for c in classes)
        self.allow_coordinator_key = allow_coordinator_key
        self.limits = limits
        self._reset()

    @abstractmethod
    def _reset(self) -> None:
        """Forget everything about earlier runs."""

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from the ``fedinfer.*`` keys of ``[tool.flwr.app.config]``.

        Parameters
        ----------
        run_config : mapping
            ``context.run_config``. Keys without the prefix are the app's own.
        **overrides
            Arguments of the constructor that the app fixes itself.

        Raises
        ------
        UnknownConfigKeyError
            For a ``fedinfer.*`` key that nothing reads, with "did you mean".
        """
        return cls(**(InferConfig.from_run_config(run_config).strategy_arguments() | overrides))

    def needs_of(self, n_queries: int, request_bytes: int = 0) -> dict[str, Any]:
        """Return what `Choosing.plan` has to know of a job."""
        return {
            "at_least": max(self.min_query_nodes, self.protection.min_cohort, self.deadline.quorum),
            "rule": self.rule,
            "protection": self.protection,
            "classes": self.classes,
            "n_queries": n_queries,
            "request_bytes": request_bytes,
            "timeout_s": self.deadline.timeout_s,
            "quorum": self.deadline.quorum,
        }

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        online = self.min_available_nodes or "all"
        rule = "auto" if self.rule is None else self.rule.name
        options = ", ".join(f"{k}={v}" for k, v in self.protection.options().items())
        return "\n".join(
            [
                "FedEnsemble",
                f"├── rule: {rule}",
                f"├── protection: {self.protection.name}{f' ({options})' if options else ''}",
                f"├── deadline: {self.deadline.timeout_s:g} s, quorum {self.deadline.quorum}",
                f"├── sites: {self.choosing.summary()},"
                f" at least {self.min_query_nodes} asked, {online} online",
                f"└── batch: {self.batch_size} queries a message",
            ]
        )

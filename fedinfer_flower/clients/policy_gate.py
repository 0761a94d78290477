"""What every message passes at a site: its rules, its counters and its audit log.

Without a site policy the gate is open: `OPEN` counts nothing, logs nothing, refuses nothing.
"""

from __future__ import annotations

import functools
import re
import threading
from collections import OrderedDict
from typing import ClassVar, Final

from flwr.app import Message

from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.policy_kinds import verb_of
from fedinfer_flower.clients.rate_guard import RateGuard
from fedinfer_flower.errors import FedInferError, PolicyRefusedError, SizeLimitError
from fedinfer_flower.observability.audit_log import AuditLog

__all__ = ["OPEN", "UNSIGNED", "Gate", "Passage", "PolicyGate", "gate_of"]

UNSIGNED: Final = "unsigned"
"""Who asked, where nobody signed."""

_RULE: Final = re.compile(r"\((\[[a-z]+\](?: [a-z-]+)?)\)")
_LIMITS: Final = "limits.sqlite"
_MAX_GREETED: Final = 10_000
"""Runs that are remembered: whoever has the SuperLink can begin any number."""

Fact = str | int | float | bool


class Gate:
    """A site without a policy: everything passes."""

    has_policy: ClassVar[bool] = False

    def passage(self, message: Message) -> Passage:
        """Return what is known of a message from now on."""
        kind = message.metadata.message_type
        return Passage(self, kind.split(".", maxsplit=1)[-1])

    def require_action(self, verb: str) -> None:
        """Refuse a verb that the policy does not list."""

    def require_size(self, n_bytes: int) -> None:
        """Refuse a message that is larger than the policy allows."""

    def require_rows(self, n_rows: int) -> None:
        """Refuse more rows in a message than the policy allows."""

    def count(self, *, querier: str, query_id: str, n_rows: int) -> None:
        """Count a query before its id is used up, or refuse it."""

    def answered(self, passage: Passage) -> None:
        """Write down that an answer leaves now."""

    def refused(self, passage: Passage, error: FedInferError) -> None:
        """Write down that a message is refused."""


class Passage:
    """One message on its way through a site.

    Parameters
    ----------
    gate : Gate
    action : str
        Of `wire.actions`, as the message says; anything.

    Attributes
    ----------
    facts : dict
        What the audit log will say. Ids, registered names and amounts, and nothing that a
        message could make up freely.
    """

    def __init__(self, gate: Gate, action: str) -> None:
        self._gate = gate
        self.verb = verb_of(action)
        self.facts: dict[str, Fact] = {"action": self.verb or "unknown"}

    @property
    def has_policy(self) -> bool:
        """Whether a site policy rules: refusals then name its table and key."""
        return self._gate.has_policy

    def note(self, **facts: Fact) -> None:
        """Add facts for the audit log."""
        self.facts.update(facts)

    def require_action(self, verb: str = "") -> None:
        """Require that the policy lists a verb, by default that of the message.

        Raises
        ------
        PolicyRefusedError
        """
        self._gate.require_action(verb or self.verb)

    def require_size(self, n_bytes: int) -> None:
        """Require a message within the policy's limit.

        Raises
        ------
        SizeLimitError
        """
        self._gate.require_size(n_bytes)

    def require_rows(self, n_rows: int) -> None:
        """Require a batch within the policy's limit.

        Raises
        ------
        SizeLimitError
        """
        self.note(n_rows=n_rows)
        self._gate.require_rows(n_rows)

    def count(self, *, querier: str, query_id: str, n_rows: int) -> None:
        """Count a query right before its id is used up.

        Raises
        ------
        PolicyRefusedError
            Naming the limit; nothing is counted then.
        """
        self._gate.count(querier=querier or UNSIGNED, query_id=query_id, n_rows=n_rows)

    def answered(self) -> None:
        """Write down that the answer leaves now.

        Raises
        ------
        AuditLogError
            If it cannot be written down; the answer must not leave.
        """
        self._gate.answered(self)

    def refused(self, error: FedInferError) -> None:
        """Write down that the message is refused.

        Raises
        ------
        AuditLogError
        """
        self._gate.refused(self, error)


class PolicyGate(Gate):
    """The gate of a site with a policy.

    Parameters
    ----------
    policy : SitePolicy

    Raises
    ------
    DeploymentError
        If the home cannot be made or others can read it.
    AuditLogError, ConfigError
        If the audit log or the counters cannot be used.

    Privacy
    -------
    The audit log, which stays at the site, says who asked what kind of thing when, how many
    rows, under which protection, and why it was refused: never what was asked or answered.
    A ``ping`` that is answered is not logged, a ``hello`` once a run and process: neither
    tells anything about an answer.
    """

    has_policy: ClassVar[bool] = True

    def __init__(self, policy: SitePolicy) -> None:
        self._policy = policy
        home = policy.open_home()
        limits, audit = policy.limits, policy.audit
        counts = limits.queries_per_minute or limits.rows_per_day or limits.rows_per_day_in_all
        self._guard = RateGuard(home / _LIMITS, limits) if counts else None
        self._audit = AuditLog(home / audit.log, role="site") if audit.enabled else None
        self._lock = threading.Lock()
        self._greeted: OrderedDict[str, None] = OrderedDict()
        if self._audit is not None:
            self._audit.append("started", site=policy.site.name, policy_digest=policy.digest)

    def require_action(self, verb: str) -> None:
        """Refuse a verb that the policy does not list."""
        if verb not in self._policy.answers.actions:
            raise PolicyRefusedError(
                f"this site does not follow {verb or 'unknown'!r} ([answers] actions)",
                hint=f"it follows {', '.join(self._policy.answers.actions)}",
            )

    def require_size(self, n_bytes: int) -> None:
        """Refuse a message that is larger than the policy allows."""
        most = self._policy.limits.bytes_per_query
        if n_bytes > most:
            raise SizeLimitError(
                f"a message of {n_bytes} bytes; this site reads {most} ([limits] bytes-per-query)",
                hint="ask fewer rows at a time",
            )

    def require_rows(self, n_rows: int) -> None:
        """Refuse more rows in a message than the policy allows."""
        most = self._policy.limits.rows_per_query
        if n_rows > most:
            raise SizeLimitError(
                f"{n_rows} rows; this site answers {most} at a time ([limits] rows-per-query)",
                hint="ask in smaller batches",
            )

    def count(self, *, querier: str, query_id: str, n_rows: int) -> None:
        """Count a query before its id is used up, or refuse it."""
        if self._guard is not None:
            self._guard.count(querier=querier, query_id=query_id, n_rows=n_rows)

    def answered(self, passage: Passage) -> None:
        """Write down that an answer leaves now."""
        if self._audit is None or passage.verb == "ping" or self._knows(passage):
            return
        self._audit.append("answered", **passage.facts)

    def refused(self, passage: Passage, error: FedInferError) -> None:
        """Write down that a message is refused."""
        if self._audit is None:
            return
        named = _RULE.search(error.message)
        rule = {} if named is None else {"rule_name": named.group(1)}
        self._audit.append("refused", **{**passage.facts, "code": error.code, **rule})

    def _knows(self, passage: Passage) -> bool:
        if passage.verb not in ("hello", "introduce"):
            return False
        key = f"{passage.verb}|{passage.facts.get('run_id', '')}"
        with self._lock:
            known = key in self._greeted
            self._greeted[key] = None
            if len(self._greeted) > _MAX_GREETED:
                self._greeted.popitem(last=False)
        return known


OPEN: Final = Gate()
"""The gate of a site without a policy."""


def gate_of(policy: SitePolicy | None) -> Gate:
    """Return the gate of a policy: the same one for all mods of a process."""
    if policy is None:
        return OPEN
    return _gates(_Key(policy))


class _Key:
    """A policy as a key: by its content and its home."""

    def __init__(self, policy: SitePolicy) -> None:
        self.policy = policy
        self._words = (str(policy.site.home.absolute()), repr(policy))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._words == other._words

    def __hash__(self) -> int:
        return hash(self._words)


@functools.lru_cache(maxsize=16)
def _gates(key: _Key) -> PolicyGate:
    return PolicyGate(key.policy)

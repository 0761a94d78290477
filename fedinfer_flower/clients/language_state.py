"""What a site with a language model keeps in its process: model, fusers, offers, fused states.

It lives at module level because Flower's simulation engine rebuilds the ClientApp for each
message. A new process has none of it, which is normal: a lost handle is a typed error, and the
coordinator sends the questions again.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.clients.language_memory import RequestMemory, request_name
from fedinfer_flower.clients.language_policy import LanguagePolicy
from fedinfer_flower.clients.model_cache import ANY_RUN, shared_key
from fedinfer_flower.clients.policy_gate import OPEN, UNSIGNED, Passage
from fedinfer_flower.errors import MediumRefusedError, UntrustedKeyError
from fedinfer_flower.kv.handles import HandleStore
from fedinfer_flower.wire.envelope import WireLimits
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.language_card import Speeds
from fedinfer_flower.wire.refine_asked import QuerierConsent

if TYPE_CHECKING:
    from fedinfer_flower.kv.fuser_bank import FuserBank
    from fedinfer_flower.kv.gate import Gate
    from fedinfer_flower.kv.past import Past
    from fedinfer_flower.language.model import LanguageModel

__all__ = ["Desk", "LanguageSite", "LanguageState", "clear", "forget_other_runs", "get_or_load"]

_MAX_STATES: Final = 1024
_STEPS: Final = ("rephrase", "refine", "own")


@dataclass(frozen=True, kw_only=True)
class LanguageSite:
    """What `load_model` may return: a model, with the site's documents.

    Parameters
    ----------
    model : LanguageModel
    documents : callable, optional
        From a question to the site's documents that bear on it.
    """

    model: LanguageModel
    documents: Callable[[str], Sequence[str]] | None = None


class LanguageState:
    """One site's model and what was computed with it.

    Parameters
    ----------
    site : LanguageSite
    bank : FuserBank
    gate : Gate, optional
    rephrase : str
    policy : LanguagePolicy
    """

    def __init__(
        self,
        site: LanguageSite,
        *,
        bank: FuserBank,
        gate: Gate | None,
        rephrase: str,
        policy: LanguagePolicy,
    ) -> None:
        self.site, self.bank, self.gate, self.rephrase = site, bank, gate, rephrase
        bounds: dict[str, Any] = {
            "max_bytes": policy.max_handle_bytes,
            "ttl_s": policy.handle_ttl_s,
        }
        self.offers: HandleStore[bytes] = HandleStore(**bounds)
        self.kept: HandleStore[Any] = HandleStore(**bounds)
        self.refined = RefinedStates(**bounds)
        self.speeds: Speeds | None = None
        # One at a time: a fast tokenizer keeps its padding in itself.
        self.lock = threading.RLock()

    @property
    def model(self) -> LanguageModel:
        """The site's model."""
        return self.site.model


class RefinedStates:
    """Fused pasts of the last rounds, by batch and querier: bounded in bytes and time."""

    def __init__(self, *, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes, self._ttl_s = max_bytes, ttl_s
        self._kept: OrderedDict[tuple[str, ...], tuple[Past, int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, key: tuple[str, ...], past: Past) -> None:
        """Keep a state in place of an older one; one that is too large is not kept."""
        size = sum(x.numel() * x.element_size() for x in (*past.keys, *past.values))
        with self._lock:
            self._kept.pop(key, None)
            if size <= self._max_bytes:
                self._kept[key] = (past, size, time.monotonic() + self._ttl_s)
            while self._kept and (
                len(self._kept) > _MAX_STATES
                or sum(kept[1] for kept in self._kept.values()) > self._max_bytes
            ):
                self._kept.popitem(last=False)

    def get(self, key: tuple[str, ...]) -> Past | None:
        """Return a state, or None if there is none any more."""
        with self._lock:
            now = time.monotonic()
            for old in [k for k, kept in self._kept.items() if kept[2] <= now]:
                del self._kept[old]
            found = self._kept.get(key)
        return None if found is None else found[0]


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a site works with when it answers one message.

    Parameters
    ----------
    state : LanguageState
    policy : LanguagePolicy
    memory : RequestMemory
    run_id : int
    limits : WireLimits
    now_s : float
        Seconds since 1970.
    querier_key_ids, peer_key_ids : frozenset of str, optional
        Known queriers and sites; None for any.
    require_seal : bool
    passage : Passage
        What is known of the message, and the rules that count it.
    """

    state: LanguageState
    policy: LanguagePolicy
    memory: RequestMemory
    run_id: int
    limits: WireLimits
    now_s: float
    querier_key_ids: frozenset[str] | None = field(default=None, repr=False)
    peer_key_ids: frozenset[str] | None = field(default=None, repr=False)
    require_seal: bool = False
    passage: Passage = field(default_factory=lambda: Passage(OPEN, ""), repr=False)

    @property
    def identity(self) -> Identity:
        """The site's keys."""
        return self.memory.identity

    def require_consent(self, consent: QuerierConsent, *, sealed: bool, round_number: int) -> None:
        """Require a querier that the site knows, and a consent that still holds.

        Raises
        ------
        UntrustedKeyError, MediumRefusedError, ExpiredError, BindingError
        """
        self.passage.note(querier=consent.querier_key_id or UNSIGNED, sealed=sealed)
        if self.require_seal and not sealed:
            raise MediumRefusedError(
                "this site works on sealed questions only" + self._rule("[answers] require-seal"),
                hint="ask through a LanguageQuerier, with fusers at the receiver",
            )
        known = self.querier_key_ids
        if known is not None and consent.querier_key_id not in known:
            raise UntrustedKeyError(
                "this site does not know the querier's key" + self._rule("[queriers]"),
                hint="give the site the querier's key id; questions in clear have no signature,"
                " so ask through a LanguageQuerier",
            )
        consent.require_open(now_s=self.now_s, round_number=round_number)
        # All rounds, not this one: what a site gives in the first is passed on in the next.
        if consent.max_rounds > self.policy.max_rounds:
            raise MediumRefusedError(
                f"{consent.max_rounds} rounds; this site takes part in {self.policy.max_rounds}"
                + self._rule("[language] max-rounds"),
                hint="ask for fewer rounds, or leave this site out",
            )

    def require_peer(self, key_id: str) -> None:
        """Require a site that this one knows.

        Raises
        ------
        UntrustedKeyError
        """
        if self.peer_key_ids is not None and key_id not in self.peer_key_ids:
            raise UntrustedKeyError(
                f"this site does not know the site with key {key_id[:16]}" + self._rule("[sites]"),
                hint="compare key ids with its operator, and pin it",
            )

    def admit(
        self, consent: QuerierConsent, *, round_number: int, verb: str, peer: str, rows: int
    ) -> None:
        """Count one request of a batch, and use it up.

        Parameters
        ----------
        rows : int
            Questions of the batch. Rewriting, refining and answering alone are steps of one
            answer, and are counted once.

        Raises
        ------
        PolicyRefusedError, ReplayError
        """
        name = request_name(
            query_id=consent.query_id, round_number=round_number, verb=verb, receiver=peer
        )
        step = "answer" if verb in _STEPS else verb
        counted = request_name(
            query_id=consent.query_id, round_number=round_number, verb=step, receiver=peer
        )
        self.passage.count(querier=consent.querier_key_id, query_id=counted, n_rows=rows)
        self.memory.admit(name, b"")

    def _rule(self, key: str) -> str:
        return f" ({key})" if self.passage.has_policy else ""

    def scope(self, *, query_id: str, verb: str) -> str:
        """Return what a handle is bound to, beside the querier."""
        return f"{self.run_id}|{self.identity.key_id}|{verb}|{query_id}"

    def state_key(self, consent: QuerierConsent, round_number: int) -> tuple[str, ...]:
        """Return the name of what was fused in a round."""
        batch = (consent.batch_id, consent.querier_key_id, str(round_number))
        return (str(self.run_id), self.identity.key_id, *batch)


_Key = tuple[int, str, str]
_states: OrderedDict[_Key, LanguageState] = OrderedDict()
_locks: dict[_Key, threading.Lock] = {}
_guard = threading.Lock()


def get_or_load(key: _Key, load: Callable[[], LanguageState], *, capacity: int) -> LanguageState:
    """Return the state of (run, partition, loader), loading it at most once at a time.

    One state for all runs where `model_cache` keeps models so: what it holds of a run is bound
    to that run by name.
    """
    key = shared_key(key)
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        with _guard:
            if key in _states:
                _states.move_to_end(key)
                return _states[key]
        state = load()
        with _guard:
            _states[key] = state
            while len(_states) > capacity:
                oldest, _ = _states.popitem(last=False)
                _locks.pop(oldest, None)
        return state


def forget_other_runs(run_ids: Collection[int]) -> None:
    """Drop the states of runs that are not among `run_ids`; those of all runs stay."""
    with _guard:
        for key in [key for key in _states if key[0] not in {ANY_RUN, *run_ids}]:
            del _states[key]
            _locks.pop(key, None)


def clear() -> None:
    """Forget all models of this process, and all that was computed with them."""
    with _guard:
        _states.clear()
        _locks.clear()

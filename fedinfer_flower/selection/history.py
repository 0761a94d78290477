"""What a coordinator remembers of sites from one run to the next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.profile import MAX_CLASSES, SiteProfile
from fedinfer_flower.query import SiteId
from fedinfer_flower.selection.candidate import AuditTally, Candidate, SiteRecord
from fedinfer_flower.selection.history_file import (
    MAX_EPOCH,
    MAX_EPOCHS,
    MAX_LATENCIES,
    MAX_SITES,
    checked_record,
    is_key_id,
    is_label,
    read_records,
    write_records,
)

__all__ = ["KnownSite", "SiteHistory"]

_MAX_SECONDS: Final = 1e12


class KnownSite(Protocol):
    """A profile with the key that signed it, such as `wire.directory.SiteCard`."""

    @property
    def profile(self) -> SiteProfile:
        """What the site declared."""
        ...

    @property
    def key_id(self) -> str:
        """Fingerprint of its key."""
        ...


class SiteHistory:
    """The coordinator's memory: a record for each key id.

    Bounded: the latest 100 latencies, 50 epochs of tallies and of merits, and 10,000 sites.
    When a site more comes, the one that was seen longest ago goes, unless it is registered.
    For one thread and one process: of two that save to one file, the later wins.

    Parameters
    ----------
    records : mapping of key id to SiteRecord, optional

    Raises
    ------
    InvalidValueError
        If a record is larger than that, or has a value that is out of its range.

    Privacy
    -------
    The file holds how often each site was right, class by class, and how quickly it
    answered. It stays with the coordinator (or the querier, who may select under seal) and
    is written readable for its user alone. It holds no question and no answer.

    Examples
    --------
    >>> history = SiteHistory()
    >>> history.register("ab12", owner="ward 3")
    >>> history.record_answer("ab12", seconds=0.4, now_s=1_000.0)
    >>> history.record_audit("ab12", epoch=1, right={"x": 3.0}, asked={"x": 4.0})
    >>> history["ab12"].owner, history["ab12"].latencies_s
    ('ward 3', (0.4,))
    """

    def __init__(self, records: Mapping[str, SiteRecord] | None = None) -> None:
        self._records: dict[str, SiteRecord] = {}
        for key_id, record in (records or {}).items():
            self._put(key_id, checked_record(record))

    def __getitem__(self, key_id: str) -> SiteRecord:
        """Return a site's record; an empty one for a site that nothing is known of."""
        return self._records.get(key_id, SiteRecord())

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> Mapping[str, SiteRecord]:
        """A copy of all records by key id."""
        return dict(self._records)

    @property
    def next_epoch(self) -> int:
        """One more than the last epoch of any audit or settlement; 1 at first."""
        seen = [t.epoch for r in self.records.values() for t in r.tallies]
        seen += [epoch for r in self.records.values() for epoch, _ in r.merits]
        return 1 + max(seen, default=0)

    def register(self, key_id: str, *, owner: str = "", jurisdiction: str = "") -> None:
        """Write down who owns a site, and under which law it is; "" takes it back.

        Compare the key with the owner's out of band first: what is registered wins over what
        the site claims.
        """
        for text in (owner, jurisdiction):
            if text and not is_label(text):
                raise InvalidValueError("owner and jurisdiction have at most 128 characters")
        self._change(key_id, owner=owner, jurisdiction=jurisdiction)

    def record_answer(self, key_id: str, seconds: float, now_s: float) -> None:
        """Add an answer that came after `seconds`, at `now_s` seconds since 1970."""
        _require_finite("seconds", seconds, low=0.0, high=_MAX_SECONDS)
        _require_finite("now_s", now_s, low=0.0, high=_MAX_SECONDS)
        latencies = (*self[key_id].latencies_s, float(seconds))[-MAX_LATENCIES:]
        self._change(key_id, latencies_s=latencies, last_seen_at=float(now_s))

    def record_audit(
        self, key_id: str, epoch: int, right: Mapping[str, float], asked: Mapping[str, float]
    ) -> None:
        """Add right and asked audit answers by class to an epoch's tally.

        Raises
        ------
        InvalidValueError
            If ``0 <= right <= asked`` does not hold for each class.
        """
        _require_epoch(epoch)
        if len(asked) > MAX_CLASSES or not all(is_label(name, most=256) for name in asked):
            raise InvalidValueError("an audit tally names classes of 1 to 256 characters")
        new = AuditTally(epoch=epoch, right=dict(right), asked=dict(asked))
        others = [t for t in self[key_id].tallies if t.epoch != epoch]
        same = [t for t in self[key_id].tallies if t.epoch == epoch]
        tally = AuditTally(
            epoch=epoch,
            right=_sums([t.right for t in same] + [new.right]),
            asked=_sums([t.asked for t in same] + [new.asked]),
        )
        tallies = sorted([*others, tally], key=lambda t: t.epoch)[-MAX_EPOCHS:]
        self._change(key_id, tallies=tuple(tallies))

    def record_merit(self, key_id: str, epoch: int, value: float) -> None:
        """Add the contribution score a query of a settled epoch.

        An epoch is settled once: the same value again changes nothing.

        Raises
        ------
        InvalidValueError
            If the epoch has another value already.
        """
        _require_epoch(epoch)
        _require_finite("a merit", value)
        merits = dict(self[key_id].merits)
        if merits.setdefault(epoch, float(value)) != value:
            raise InvalidValueError(
                f"epoch {epoch} was settled with another score for this site",
                hint="an epoch is settled once; count audits that came later to the next",
            )
        self._change(key_id, merits=tuple(sorted(merits.items())[-MAX_EPOCHS:]))

    def record_reputation(self, key_id: str, alpha: float, beta: float) -> None:
        """Replace the Beta parameters of a site's reputation."""
        self._change(key_id, reputation=(float(alpha), float(beta)))

    def record_epsilon(self, key_id: str, left: float | None) -> None:
        """Replace what a site says is left of its privacy budget; None if it does not say."""
        if left is not None:
            _require_finite("epsilon left", left, low=0.0)
        self._change(key_id, epsilon_left=None if left is None else float(left))

    def record_cluster(self, key_id: str, cluster: str) -> None:
        """Replace the duplicate cluster of the last settlement; "" if alone."""
        if cluster and not is_label(cluster):
            raise InvalidValueError("a cluster has at most 128 characters")
        self._change(key_id, cluster=cluster)

    def forget(self, key_id: str) -> None:
        """Drop all that is known of a site, its registration included."""
        self._records.pop(key_id, None)

    def candidates(self, sites: Mapping[SiteId, KnownSite | SiteProfile]) -> tuple[Candidate, ...]:
        """Return the sites of a run with what is remembered of them, by node id.

        Records go with the key that signed a card, never with a name. A bare profile proves
        no key, so it gets an empty record.
        """
        found = []
        for site_id, site in sorted(sites.items()):
            if isinstance(site, SiteProfile):
                found.append(Candidate(site_id=site_id, profile=site))
            else:
                record = self[site.key_id]
                found.append(
                    Candidate(
                        site_id=site_id, profile=site.profile, key_id=site.key_id, record=record
                    )
                )
        return tuple(found)

    def save(self, path: str | Path) -> None:
        """Write all records to a JSON file, whole or not at all.

        Raises
        ------
        ConfigError
            If it cannot be written, or would be too large to be read again.
        """
        write_records(Path(path), self._records)

    @classmethod
    def load(cls, path: str | Path, *, missing_ok: bool = False) -> SiteHistory:
        """Read a file that `save` wrote.

        Parameters
        ----------
        missing_ok : bool
            Return an empty history where there is no file.

        Raises
        ------
        ConfigError
            If the file is missing, too large, or not exactly a history.
        """
        if missing_ok and not Path(path).exists():
            return cls()
        return cls(read_records(Path(path)))

    def _change(self, key_id: str, **changes: object) -> None:
        self._put(key_id, dataclasses.replace(self[key_id], **changes))  # type: ignore[arg-type]

    def _put(self, key_id: str, record: SiteRecord) -> None:
        if not is_key_id(key_id):
            raise InvalidValueError("a key id has 1 to 128 printable ASCII characters")
        if key_id not in self._records and len(self._records) >= MAX_SITES:
            strangers = [k for k, known in self._records.items() if not known.owner]
            if not strangers:
                raise InvalidValueError(
                    f"the history is full: {MAX_SITES} registered sites",
                    hint="forget sites that are gone",
                )
            del self._records[min(strangers, key=self._age_rank)]
        self._records[key_id] = record

    def _age_rank(self, key_id: str) -> float:
        return self._records[key_id].last_seen_at or 0.0


def _sums(parts: list[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def _require_epoch(epoch: int) -> None:
    if type(epoch) is not int or not 0 <= epoch <= MAX_EPOCH:
        raise InvalidValueError(f"an epoch is a whole number from 0 to {MAX_EPOCH}")


def _require_finite(
    what: str, value: float, *, low: float = -math.inf, high: float = math.inf
) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidValueError(f"{what} is a finite number in [{low:g}, {high:g}]")

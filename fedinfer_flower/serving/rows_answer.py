"""`RowsAnswer`: the parts of an answer to rows, put together as they come."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.query import Prediction, QueryReport

__all__ = ["RowsAnswer", "RowsFound", "merged_provenance", "provenance_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsFound:
    """What one batch found for one part of a job.

    Parameters
    ----------
    start : int
        Of the part, in the job's rows.
    prediction : Prediction
        Of the whole batch.
    places : int array of shape (n_rows,)
        Where in the batch the part's rows are.
    provenance : mapping
        Of the batch.
    receipt : bytes
    earned : mapping of str to float
        Credits a row at the sites' prices, by key id.
    """

    start: int
    prediction: Prediction
    places: npt.NDArray[np.intp]
    provenance: Mapping[str, Any]
    receipt: bytes = field(default=b"", repr=False)
    earned: Mapping[str, float] = field(default_factory=dict)


class RowsAnswer:
    """An answer that batches fill in.

    Parameters
    ----------
    n_rows : int
    """

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._found: dict[int, RowsFound] = {}
        self._lock = threading.Lock()

    def put(self, found: RowsFound) -> int:
        """Fill rows in; return how many there are."""
        with self._lock:
            self._found[found.start] = found
            return sum(len(part.places) for part in self._found.values())

    def body(self) -> bytes:
        """Return the answer as JSON.

        Batches may have asked other sites, with other classes: all have a column then, and a
        class that no site of a batch knows has probability 0 in its rows.
        """
        parts = self._parts()
        classes = list(dict.fromkeys(c for part in parts for c in part.prediction.classes))
        labels: list[str] = []
        probabilities: list[list[float]] = []
        margin: list[float] = []
        abstained: list[bool] = []
        for part in parts:
            found, places = part.prediction, part.places
            wide = np.zeros((len(places), len(classes)))
            wide[:, [classes.index(c) for c in found.classes]] = found.probabilities[places]
            labels += [found.classes[i] for i in found.labels[places]]
            probabilities += wide.tolist()
            margin += found.margin[places].tolist()
            abstained += found.abstained[places].tolist()
        place_of = {name: i for i, name in enumerate(classes)}
        return json.dumps(
            {
                "classes": classes,
                "labels": labels,
                "indices": [place_of[name] for name in labels],
                "probabilities": probabilities,
                "margin": margin,
                "abstained": abstained,
            },
            separators=(",", ":"),
            allow_nan=False,
        ).encode()

    def provenance(self) -> dict[str, Any]:
        """Return what the batches have to say together."""
        return merged_provenance([part.provenance for part in self._parts()])

    def receipt(self) -> bytes:
        """Return the receipt; of several batches ``{"receipts": [...]}``."""
        receipts = [part.receipt for part in self._parts() if part.receipt]
        if len(receipts) < 2:
            return b"".join(receipts)
        return b'{"receipts":[' + b",".join(receipts) + b"]}"

    def earned(self) -> dict[str, float]:
        """Return credits at the sites' prices, by key id, for all rows."""
        total: dict[str, float] = {}
        for part in self._parts():
            for key_id, price in part.earned.items():
                total[key_id] = total.get(key_id, 0.0) + price * len(part.places)
        return total

    def _parts(self) -> list[RowsFound]:
        with self._lock:
            return [self._found[start] for start in sorted(self._found)]


def merged_provenance(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one provenance of several batches: counts of the worst, sums of bytes.

    Examples
    --------
    >>> a = {"sites_answered": 3, "degraded": False, "reply_bytes": 10, "query_ids": ["x-0"]}
    >>> b = {"sites_answered": 2, "degraded": True, "reply_bytes": 12, "query_ids": ["y-0"]}
    >>> merged_provenance([a, b])  # doctest: +NORMALIZE_WHITESPACE
    {'sites_answered': 2, 'degraded': True, 'reply_bytes': 22, 'query_ids': ['x-0', 'y-0'],
     'batches': 2}
    """
    how: dict[str, Any] = {
        "sites_answered": min,
        "sites_asked": max,
        "degraded": any,
        "seconds": max,
        "request_bytes": sum,
        "reply_bytes": sum,
        "query_ids": lambda lists: [i for ids in lists for i in ids],
    }
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= dict(part)
    for name, fold in how.items():
        values = [part[name] for part in parts if name in part]
        if values:
            merged[name] = fold(values)
    if len(parts) > 1:
        merged["batches"] = len(parts)
    return merged


def provenance_of(reports: Sequence[QueryReport]) -> dict[str, Any]:
    """Return what reports say, as JSON values."""
    return merged_provenance([_of_one(report) for report in reports])


def _of_one(report: QueryReport) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "sites_asked": len(report.sites),
        "sites_answered": len(report.answered),
        "degraded": report.degraded,
        "rule": report.rule,
        "protection": report.protection,
        "request_bytes": report.request_bytes,
        "reply_bytes": report.reply_bytes,
        "seconds": round(report.seconds, 6),
        "query_ids": [str(report.query_id)],
    }
    if report.epsilon_per_query is not None:
        facts["epsilon_per_query"] = report.epsilon_per_query
        facts["delta_per_query"] = report.delta_per_query
    return facts

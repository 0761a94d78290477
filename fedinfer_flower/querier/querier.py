"""`Querier`: makes keys, encodes queries, opens sums, decides."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import BindingError, InvalidValueError, ShapeError
from fedinfer_flower.privacy.base import KeyPair, Protection, ScorePlan, make_protection
from fedinfer_flower.privacy.key_presence import note_secret
from fedinfer_flower.query import Prediction
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch, QueryJob

__all__ = ["Querier"]


class Querier:
    """Ask questions and open the joint answer. Lives outside the coordinator's process.

    Keys are fresh for every object. What `ask` returns is public; what opens the answer
    never leaves this object, except through `save_secret`.

    Parameters
    ----------
    protection : str or Protection
        How the sites are to protect their answers; the same as the strategy's.
    keys : KeyPair, optional
        Keys of an earlier session; default fresh ones.
    tie_seed : int
        Decides ties between classes by lot.

    Privacy
    -------
    The querier learns the combined scores of every query. Under `he`, a querier that
    pools what it has with what the coordinator has can open each site's own answer.

    Examples
    --------
    >>> querier = Querier(protection="plain")
    >>> job = querier.ask(np.zeros((3, 4)))
    >>> len(job.inputs), job.key_id
    (3, '')
    """

    def __init__(
        self,
        *,
        protection: str | Protection = "he",
        keys: KeyPair | None = None,
        tie_seed: int = 0,
    ) -> None:
        self.protection = (
            make_protection(protection, {}) if isinstance(protection, str) else protection
        )
        self._keys = self.protection.make_keys() if keys is None else keys
        self._tie_seed = tie_seed
        self._asked: dict[str, tuple[tuple[str, int], ...]] = {}
        if self._keys.secret_key:
            note_secret(self._keys.key_id)

    def __repr__(self) -> str:
        return f"Querier(protection={self.protection.name!r}, key_id={self.key_id[:16]!r})"

    @property
    def key_id(self) -> str:
        """Fingerprint of the public key: what a site pins, out of band."""
        return self._keys.key_id

    def ask(
        self,
        inputs: npt.ArrayLike,
        *,
        batch_size: int = 1024,
        classes: Sequence[str] | None = None,
    ) -> QueryJob:
        """Encode queries for the coordinator.

        Parameters
        ----------
        inputs : array of shape (n_queries, ...)
        batch_size : int
            Queries in one message.
        classes : sequence of str, optional
            Label space of the answer; default the union of the sites' classes.

        Raises
        ------
        InvalidValueError
            If the inputs cannot travel.
        """
        job = QueryJob(
            job_id=secrets.token_hex(16),
            inputs=np.asarray(inputs),
            batch_size=batch_size,
            protection=self.protection.name,
            protection_options=self.protection.options(),
            public_key=self._keys.public_key,
            key_id=self.key_id,
            classes=None if classes is None else tuple(str(c) for c in classes),
        )
        self._asked[job.job_id] = tuple((q, len(rows)) for q, rows in job.batches())
        return job

    def open(self, combined: CombinedAnswer) -> Prediction:
        """Open a combined answer to a job of this querier, and decide.

        Raises
        ------
        BindingError
            If the answer belongs to another querier, key, job or protection.
        ProtocolError
            If it does not open to scores that the sites in it could have sent.
        """
        self._check(combined)
        rule = make_rule(combined.rule, dict(combined.rule_options))
        parts = [
            rule.decide(
                self._open_batch(batch, combined, rule),
                batch.n_sites,
                combined.classes,
                tie_seed=self._tie_seed + number,
            )
            for number, batch in enumerate(combined.batches)
        ]
        return _joined(parts)

    def totals(self, combined: CombinedAnswer) -> npt.NDArray[np.float64]:
        """Return the combined scores themselves, shape (n_queries, score_width)."""
        self._check(combined)
        rule = make_rule(combined.rule, dict(combined.rule_options))
        return np.concatenate([self._open_batch(b, combined, rule) for b in combined.batches])

    def save_secret(self, path: str | Path) -> None:
        """Write the querier's whole state to a file that only its owner may read."""
        from fedinfer_flower.querier.secret_file import write_secret

        write_secret(
            Path(path),
            protection=self.protection,
            keys=self._keys,
            asked=self._asked,
            tie_seed=self._tie_seed,
        )

    @classmethod
    def load_secret(cls, path: str | Path) -> Querier:
        """Return the querier whose state `save_secret` wrote."""
        from fedinfer_flower.querier.secret_file import read_secret

        protection, keys, asked, tie_seed = read_secret(Path(path))
        querier = cls(protection=protection, keys=keys, tie_seed=tie_seed)
        querier._asked = dict(asked)
        return querier

    def _open_batch(
        self, batch: CombinedBatch, combined: CombinedAnswer, rule: EnsembleRule
    ) -> npt.NDArray[np.float64]:
        plan = ScorePlan.for_rule(
            rule, n_classes=len(combined.classes), n_sites_max=combined.n_sites_asked
        )
        side = self.protection.querier_side(plan, keys=self._keys)
        return side.open(batch.total, n_queries=batch.n_queries, n_sites=batch.n_sites)

    def _check(self, combined: CombinedAnswer) -> None:
        asked = self._asked.get(combined.job_id)
        if asked is None:
            raise BindingError("the combined answer belongs to a job of another querier")
        if combined.key_id != self.key_id:
            raise BindingError("the combined answer is made under another key")
        own: tuple[str, Mapping[str, Any]] = (self.protection.name, self.protection.options())
        if (combined.protection, dict(combined.protection_options)) != (own[0], dict(own[1])):
            raise BindingError("the combined answer is protected otherwise than was asked")
        if tuple((b.query_id, b.n_queries) for b in combined.batches) != asked:
            raise BindingError("the combined answer does not cover the job's queries")
        if not combined.classes or len(set(combined.classes)) != len(combined.classes):
            raise ShapeError("the combined answer has no classes, or one twice")
        for batch in combined.batches:
            if not self.protection.min_cohort <= batch.n_sites <= combined.n_sites_asked:
                raise BindingError(
                    f"a batch claims {batch.n_sites} sites of {combined.n_sites_asked},"
                    f" {self.protection.min_cohort} are needed"
                )


def _joined(parts: list[Prediction]) -> Prediction:
    if not parts:
        raise InvalidValueError("a combined answer without batches")
    return Prediction(
        classes=parts[0].classes,
        labels=np.concatenate([p.labels for p in parts]),
        probabilities=np.concatenate([p.probabilities for p in parts]),
        margin=np.concatenate([p.margin for p in parts]),
        abstained=np.concatenate([p.abstained for p in parts]),
    )

"""`EncryptedQuerier`: asks without showing the query to anyone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.encrypted_query.ckks_batch import SecretKeys
from fedinfer_flower.encrypted_query.documents import NAME, EncryptedBatch, EncryptedJob
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR
from fedinfer_flower.ensemble.mean_logit import MeanLogit
from fedinfer_flower.errors import (
    BindingError,
    InvalidScoresError,
    InvalidValueError,
    ShapeError,
)
from fedinfer_flower.privacy.key_presence import note_secret
from fedinfer_flower.query import Prediction
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch

__all__ = ["EncryptedQuerier"]

_PLANS: Final = {1: LINEAR, 2: HIDDEN_LAYER}


class EncryptedQuerier:
    """Encrypt queries, and open the sum of the sites' encrypted logits.

    Keys are fresh for every object and stay in it: there is no way to write the secret key.

    Parameters
    ----------
    depth : {1, 2}
        Affine layers of the largest model that is to answer: 1 for linear models, 2 for
        networks with one hidden layer. Linear models can answer under 2 as well.
    tie_seed : int
        Decides ties between classes by lot.

    Privacy
    -------
    Coordinator and sites learn the number of queries, features and classes, and the
    declared `input_bound`; under the hardness of ring learning with errors, nothing of the
    inputs. The querier learns the sum of the sites' logits, with noise. What it decrypts
    must not go to those who saw the ciphertexts: decrypted CKKS values help to find the
    key (Li and Micciancio, 2021). Labels to a few digits are another matter.

    Examples
    --------
    >>> querier = EncryptedQuerier(depth=1)
    >>> job = querier.ask(np.full((3, 4), 0.5))
    >>> job.n_queries, job.plan.name, job.key_id == querier.key_id
    (3, 'linear', True)
    """

    def __init__(self, *, depth: int = 2, tie_seed: int = 0) -> None:
        if depth not in _PLANS:
            raise InvalidValueError(
                f"depth is 1 (linear) or 2 (one hidden layer), got {depth!r}",
                hint="deeper networks do not fit; encrypt an embedding made by the querier",
            )
        self._keys = SecretKeys(_PLANS[depth])
        self._tie_seed = tie_seed
        self._asked: dict[str, EncryptedJob] = {}
        note_secret(self.key_id)

    def __repr__(self) -> str:
        return f"EncryptedQuerier(plan={self._keys.plan.name!r}, key_id={self.key_id[:16]!r})"

    @property
    def key_id(self) -> str:
        """Fingerprint of the public key: what a site must pin, out of band."""
        return self._keys.key_id

    def ask(
        self,
        inputs: npt.ArrayLike,
        *,
        n_features: int | None = None,
        classes: Sequence[str] | None = None,
        input_bound: float = 1.0,
    ) -> EncryptedJob:
        """Encrypt queries for the coordinator.

        A batch of one costs what a full batch costs: ask many rows at once.

        Parameters
        ----------
        inputs : float array of shape (n_queries, n_features)
            Prepared as the sites' models expect, with entries within `input_bound`.
        n_features : int, optional
            What the sites expect, as a check.
        classes : sequence of str, optional
            Label space of the answer; default the union of the sites' classes.
        input_bound : float
            Declared to the sites, which check that their logits cannot wrap around.

        Raises
        ------
        InvalidValueError
            If the inputs have another shape, are not finite, or exceed the bound.
        """
        rows = np.asarray(inputs, dtype=np.float64)
        if rows.ndim != 2 or len(rows) == 0 or n_features not in {None, rows.shape[1]}:
            wanted = "n_features" if n_features is None else n_features
            raise InvalidValueError(f"queries have shape {rows.shape}, expected (n, {wanted})")
        # NaN compares false with everything: "not <=" catches it with the rest.
        if not bool((np.abs(rows) <= input_bound).all()):
            raise InvalidValueError(
                f"queries are not finite, or exceed input_bound={input_bound:g}",
                hint="scale or clip them, or declare a larger bound; sites see the bound",
            )
        job_id, slots = secrets.token_hex(16), self._keys.plan.slots
        batches = [
            EncryptedBatch(
                query_id=f"{job_id}-{number}",
                n_queries=len(rows[start : start + slots]),
                inputs=self._keys.encrypt(rows[start : start + slots]),
            )
            for number, start in enumerate(range(0, len(rows), slots))
        ]
        job = EncryptedJob(
            job_id=job_id,
            plan=self._keys.plan,
            n_features=rows.shape[1],
            input_bound=float(input_bound),
            public_key=self._keys.public_key,
            key_id=self.key_id,
            batches=tuple(batches),
            classes=None if classes is None else tuple(str(name) for name in classes),
        )
        self._asked[job_id] = job
        return job

    def open(self, combined: CombinedAnswer) -> Prediction:
        """Open a combined answer to a job of this querier, and decide.

        Raises
        ------
        BindingError
            If the answer belongs to another querier, key, job or protection.
        InvalidScoresError
            If it does not open to logits that sites could have sent.
        """
        self._check(combined)
        parts = [
            MeanLogit().decide(
                self._totals(batch, combined),
                batch.n_sites,
                combined.classes,
                tie_seed=self._tie_seed + number,
            )
            for number, batch in enumerate(combined.batches)
        ]
        return Prediction(
            classes=combined.classes,
            labels=np.concatenate([part.labels for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
            margin=np.concatenate([part.margin for part in parts]),
            abstained=np.concatenate([part.abstained for part in parts]),
        )

    def totals(self, combined: CombinedAnswer) -> npt.NDArray[np.float64]:
        """Return the sums of logits themselves, shape (n_queries, n_classes)."""
        self._check(combined)
        return np.concatenate([self._totals(batch, combined) for batch in combined.batches])

    def _totals(self, batch: CombinedBatch, combined: CombinedAnswer) -> npt.NDArray[np.float64]:
        opened = self._keys.decrypt(batch.total, n_classes=len(combined.classes))
        totals = np.ascontiguousarray(opened[:, : batch.n_queries].real.T)
        # A sound sum stays below the capacity; garbage fills the modulus.
        if not bool((np.abs(totals) <= self._keys.plan.capacity).all()):
            raise InvalidScoresError("the combined logits are beyond what sites may send")
        return totals

    def _check(self, combined: CombinedAnswer) -> None:
        job = self._asked.get(combined.job_id)
        if job is None:
            raise BindingError("the combined answer belongs to a job of another querier")
        if combined.key_id != self.key_id:
            raise BindingError("the combined answer is made under another key")
        if (combined.protection, combined.rule) != (NAME, "mean-logit"):
            raise BindingError("the combined answer is protected otherwise than was asked")
        asked = [(batch.query_id, batch.n_queries) for batch in job.batches]
        if [(batch.query_id, batch.n_queries) for batch in combined.batches] != asked:
            raise BindingError("the combined answer does not cover the job's queries")
        if not combined.classes or len(set(combined.classes)) != len(combined.classes):
            raise ShapeError("the combined answer has no classes, or one twice")
        if job.classes is not None and combined.classes != job.classes:
            raise BindingError("the combined answer has other classes than were asked")
        if any(not 1 <= batch.n_sites <= combined.n_sites_asked for batch in combined.batches):
            raise BindingError("a batch claims more sites than were asked")

"""A local model made ready to answer: adapted, calibrated, with its profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.base import ModelAdapter, adapt, class_name
from fedinfer_flower.clients.calibration import MIN_HOLDOUT, confusion_matrix, fit_temperature
from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.familiarity import Familiarity
from fedinfer_flower.clients.label_space import align_logits
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.model_digest import model_digest
from fedinfer_flower.ensemble.base import Array, EnsembleRule, Evidence, SiteContext
from fedinfer_flower.errors import (
    BudgetExceededError,
    InvalidValueError,
    ModelAnswerError,
    ModelError,
    ShapeError,
)
from fedinfer_flower.query import CountsKind, SiteProfile
from fedinfer_flower.wire.messages import Question

__all__ = ["SiteModel", "prepare"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteModel:
    """What stays resident at a site between queries.

    Parameters
    ----------
    adapter : ModelAdapter
    profile : SiteProfile
        What the coordinator is told.
    local : LocalModel
    confusion : float array of shape (n_local_classes, n_local_classes), optional
    familiarity : Familiarity, optional
    """

    adapter: ModelAdapter
    profile: SiteProfile
    local: LocalModel
    confusion: Array | None
    familiarity: Familiarity | None

    def calibrated_logits(
        self,
        inputs: npt.NDArray[np.generic],
        classes: tuple[str, ...],
        *,
        neutral: bool = False,
    ) -> Array:
        """Return calibrated log-probabilities over `classes`, shape (n_queries, n_classes).

        Parameters
        ----------
        neutral : bool
            Answer a row that overflows the model as one that it knows nothing about. That
            a row overflows is an exact fact about the weights, and an error carries no noise.
        """
        raw = checked_logits(self.adapter, inputs, neutral=neutral)
        return align_logits(raw / self.profile.temperature, self.adapter.classes, classes)

    def context(self, asked: Question, rule: EnsembleRule) -> SiteContext:
        """Gather the evidence that a rule asks for, and nothing else."""
        classes = asked.classes
        known = set(self.adapter.classes)
        return SiteContext(
            present=np.array([name in known for name in classes]),
            class_counts=None
            if asked.class_totals is None
            else self.profile.aligned_counts(classes, asked.counts_kind),
            class_totals=asked.class_totals,
            confusion=self._confusion(classes) if Evidence.CONFUSION in rule.needs else None,
            augmented_tbc=self._augmented(asked) if Evidence.AUGMENTED in rule.needs else None,
            familiarity=self.familiarity.score(asked.inputs)
            if self.familiarity is not None and Evidence.FAMILIARITY in rule.needs
            else None,
        )

    def _confusion(self, classes: tuple[str, ...]) -> Array:
        full = np.full((len(classes), len(classes)), 1.0 / len(classes))
        if self.confusion is None:  # nothing measured: every vote says the same of every class
            return full
        place = {name: column for column, name in enumerate(classes)}
        pairs = [(i, place[name]) for i, name in enumerate(self.adapter.classes) if name in place]
        here, there = np.array(pairs, dtype=np.int64).T
        # A class the site knows: its measured row, with a little mass on absent columns.
        full[there] = 1e-4
        full[np.ix_(there, there)] = self.confusion[np.ix_(here, here)]
        return np.asarray(full / full.sum(axis=1, keepdims=True))

    def _augmented(self, asked: Question) -> Array | None:
        if self.local.augment is None:
            return None
        with contained(ModelAnswerError, "augment failed", hint="see the site's own log"):
            copies = [np.asarray(copy) for copy in self.local.augment(asked.inputs)]
        if not copies or any(len(copy) != asked.n_queries for copy in copies):
            raise ShapeError("augment did not return copies with one row a query")
        return np.stack([self.calibrated_logits(copy, asked.classes) for copy in copies])


def checked_logits(
    adapter: ModelAdapter, inputs: npt.NDArray[np.generic], *, neutral: bool = False
) -> Array:
    """Run the model and require finite logits of shape (n_queries, n_local_classes).

    With `neutral`, rows that are not finite become rows of zeros instead.

    Raises
    ------
    ModelAnswerError
        If the model returns anything else; the text says what, never the values.
    BudgetExceededError
        If a model that keeps a budget of its own has spent it.
    """
    hint = "see the site's own log; are shape and dtype of the inputs right?"
    with contained(ModelAnswerError, "the local model failed on the query", hint=hint):
        try:
            # What overflows is dealt with below; a warning would end in the site's log.
            with np.errstate(all="ignore"):
                out, spent = adapter.logits(inputs), False
        except BudgetExceededError:  # its own text may say anything: fixed words leave
            out, spent = np.empty((0, 0)), True
    if spent:
        raise BudgetExceededError(
            "the local model's privacy budget does not cover the new rows",
            hint="ask fewer rows, or rows that were answered before",
        )
    expected = (len(inputs), len(adapter.classes))
    if out.shape != expected:
        raise ModelAnswerError(
            f"the local model returned shape {out.shape}, expected {expected}",
            hint="one row a query and one column a class; see LocalModel(classes=...)",
        )
    finite = np.isfinite(out).all(axis=1, keepdims=True)
    if neutral:
        return np.where(finite, out, 0.0)
    if not finite.all():
        raise ModelAnswerError("the local model returned NaN or infinite values")
    return out


def prepare(loaded: object, *, name: str, share_counts: CountsKind) -> SiteModel:
    """Make what `load_model` returned ready to answer.

    Parameters
    ----------
    loaded : LocalModel or model
    name : str
        The site's name.
    share_counts : CountsKind
        What of the class counts leaves the site.

    Raises
    ------
    ModelError
        If the model cannot be used, or its facts contradict each other.
    """
    local = loaded if isinstance(loaded, LocalModel) else LocalModel(model=loaded)
    if local.model is None:
        raise ModelError("load_model returned nothing", hint="return the model, or a LocalModel")
    adapter = adapt(local.model, classes=local.classes, outputs=local.outputs)
    temperature, confusion = _calibrate(adapter, local)
    reference = local.reference_inputs
    familiarity = Familiarity.fit(reference) if reference is not None else None
    counts_kind, counts = _shared_counts(adapter, local, share_counts)
    try:
        profile = SiteProfile(
            name=name,
            classes=adapter.classes,
            counts_kind=counts_kind,
            class_counts=counts,
            calibrated=confusion is not None,
            temperature=temperature,
            familiarity=familiarity is not None,
            model_card={"kind": adapter.kind[:64], **local.model_card},
            price_per_query=local.price_per_query,
            model_digest=local.digest or model_digest(local.model),
            record_epsilon=None if local.record_privacy is None else local.record_privacy[0],
            record_delta=None if local.record_privacy is None else local.record_privacy[1],
        )
    except InvalidValueError as exc:
        raise ModelError(f"the site's profile is not valid: {exc.message}") from None
    return SiteModel(
        adapter=adapter,
        profile=profile,
        local=local,
        confusion=confusion,
        familiarity=familiarity,
    )


def _calibrate(adapter: ModelAdapter, local: LocalModel) -> tuple[float, Array | None]:
    if local.holdout is None:
        return 1.0, None
    inputs, labels = local.holdout
    place = {name: column for column, name in enumerate(adapter.classes)}
    columns = np.array([place.get(class_name(label), -1) for label in labels], dtype=np.int64)
    known = columns >= 0
    if len(inputs) != len(columns) or known.sum() < MIN_HOLDOUT:
        return 1.0, None
    logits = checked_logits(adapter, np.asarray(inputs)[known])
    tau = fit_temperature(logits, columns[known])
    votes = logits.argmax(axis=1)
    return tau, confusion_matrix(votes, columns[known], len(adapter.classes))


def _shared_counts(
    adapter: ModelAdapter, local: LocalModel, share: CountsKind
) -> tuple[CountsKind, tuple[float, ...] | None]:
    if share is CountsKind.WITHHELD:
        return share, None
    counts = _counts(adapter, local.class_counts)
    if counts is None:  # the model's classes are known, so presence is
        return CountsKind.PRESENCE, tuple(1.0 for _ in adapter.classes)
    if share is CountsKind.PRESENCE:
        return share, tuple(float(n > 0) for n in counts)
    return share, counts


def _counts(
    adapter: ModelAdapter, declared: Mapping[Any, float] | Sequence[float] | None
) -> tuple[float, ...] | None:
    if declared is None:
        return None
    if isinstance(declared, Mapping):
        named = {class_name(key): float(n) for key, n in declared.items()}
        return tuple(named.get(name, 0.0) for name in adapter.classes)
    counts = tuple(float(n) for n in declared)
    if len(counts) != len(adapter.classes):
        raise ModelError(
            f"{len(counts)} class counts for {len(adapter.classes)} classes",
            hint="give class_counts as a mapping of class to count",
        )
    return counts

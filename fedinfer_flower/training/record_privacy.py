"""What a site may say of a model that it trained with DP-SGD: `RecordPrivacy`."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module

__all__ = ["ACCOUNTANTS", "EXTRA", "RecordPrivacy", "calibrated_noise", "spent_epsilon"]

EXTRA: Final = "dp-training"

ACCOUNTANTS: Final = ("prv", "rdp")
"""Accountants of opacus that never promise too much."""

_MIN_EPSILON: Final = 0.05
"""The PRV accountant rounds up by 0.01; below, most of the budget would be rounding."""

_MAX_EPSILON: Final = 64.0


def require_accountant(name: str) -> None:
    """Refuse an accountant that under-reports, or that does not exist.

    Raises
    ------
    InvalidValueError
        For everything but `ACCOUNTANTS`.
    """
    if name == "gdp":
        raise InvalidValueError(
            "accountant 'gdp' of opacus is a limit theorem, not a bound: for sampled batches it"
            " reports less epsilon than is spent",
            hint="use accountant='prv'",
        )
    if name not in ACCOUNTANTS:
        raise InvalidValueError(
            f"no accountant is called {name[:32]!r}", hint=f"use {' or '.join(ACCOUNTANTS)}"
        )


def spent_epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str
) -> float:
    """Return the epsilon of this many steps of sampled Gaussian noise, rounded up.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the clipping norm.
    sample_rate : float
        Chance of a record to be in a batch, in (0, 1].
    steps : int
    delta : float
    accountant : {"prv", "rdp"}

    Raises
    ------
    MissingExtraError
        Without the extra ``dp-training``.

    Notes
    -----
    ``"prv"`` composes privacy loss distributions numerically and returns the upper end of
    its error interval, about 0.01 above the truth; ``"rdp"`` is 3 to 10 % above.

    References
    ----------
    .. [1] Gopi, Lee and Wutschitz, Numerical Composition of Differential Privacy, 2021.
    .. [2] Mironov, Talwar and Zhang, Renyi Differential Privacy of the Sampled Gaussian
       Mechanism, 2019.

    Examples
    --------
    >>> facts = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 100, "delta": 1e-5}
    >>> 7.04 < spent_epsilon(accountant="prv", **facts) < 7.07
    True
    """
    require_accountant(accountant)
    history = [(noise_multiplier, sample_rate, steps)]
    ledger = optional_module("opacus.accountants", extra=EXTRA).create_accountant(accountant)
    ledger.history = history
    with warnings.catch_warnings():  # at sample rate 1 a branch that is not taken divides by 0
        warnings.simplefilter("ignore")
        return float(ledger.get_epsilon(delta=delta))


@functools.lru_cache(maxsize=64)
def calibrated_noise(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str
) -> float:
    """Return a noise multiplier with which `steps` steps spend at most `epsilon`.

    Raises
    ------
    InvalidValueError
        If no noise multiplier below 10^6 does.
    MissingExtraError
        Without the extra ``dp-training``.
    """
    require_accountant(accountant)
    if not _MIN_EPSILON <= epsilon <= _MAX_EPSILON:
        raise InvalidValueError(
            f"epsilon of a training is in [{_MIN_EPSILON:g}, {_MAX_EPSILON:g}], got {epsilon!r}",
            hint="promises are worth the name up to about 10",
        )
    search = optional_module("opacus.accountants.utils", extra=EXTRA).get_noise_multiplier
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(
                search(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=accountant,
                    epsilon_tolerance=min(0.01, 0.05 * epsilon),
                )
            )
    except ValueError:
        raise InvalidValueError(
            f"no noise is large enough for epsilon {epsilon:g} in {steps} steps",
            hint="train fewer epochs, in smaller batches, or with a larger epsilon or delta",
        ) from None


@dataclass(frozen=True, kw_only=True)
class RecordPrivacy:
    """A site's claim about the records that its model was trained on.

    Parameters
    ----------
    epsilon, delta : float
        Privacy of one record, for the finished model and everything computed from it.
    noise_multiplier : float
        Standard deviation of the noise over `max_grad_norm`.
    sample_rate : float
        Chance of a record to be in a batch.
    steps : int
        Noisy steps that were taken.
    max_grad_norm : float
        L2 norm to which each record's gradient was clipped.
    accountant : {"prv", "rdp"}

    Raises
    ------
    InvalidValueError
        If a number is not one that a training can have.

    Privacy
    -------
    Neighbours: training sets that differ in one record, added or removed. Who sees the
    model or any number of its answers, alone or colluding with everybody but the site
    itself, learns about one record at most what (epsilon, delta) allows. Answers do not
    add to it: they are post-processing.

    **A claim**: nobody outside the site can verify it. `recomputed_epsilon` shows that
    the numbers fit together, not that they are true.

    Not covered: the site as a whole; several records of one person; records that tell of
    each other; the number of records, which counts as public; hyperparameters that were
    chosen with the same records; everything else that the site derives from the records
    and lets out (class counts, temperature, confusion matrix, familiarity).

    Examples
    --------
    >>> claim = RecordPrivacy(
    ...     epsilon=2.99, delta=1e-5, noise_multiplier=2.5, sample_rate=0.1, steps=300,
    ...     max_grad_norm=1.0,
    ... )
    >>> RecordPrivacy.from_dict(claim.to_dict()) == claim
    True
    >>> claim.as_model_card()["record-dp-epsilon"]
    '2.99'
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    accountant: str = "prv"

    def __post_init__(self) -> None:
        require_accountant(self.accountant)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidValueError("steps is a whole number of at least 1")
        for name in ("epsilon", "delta", "noise_multiplier", "sample_rate", "max_grad_norm"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int):
                raise InvalidValueError(f"{name} is a number, got {type(value).__name__}")
            if not (math.isfinite(value) and value > 0.0):
                raise InvalidValueError(f"{name} is a positive number")
            object.__setattr__(self, name, float(value))
        if self.delta >= 1.0 or self.sample_rate > 1.0:
            raise InvalidValueError("delta is below 1, and sample_rate at most 1")

    def recomputed_epsilon(self) -> float:
        """Return the epsilon that noise, sample rate, steps and delta amount to.

        A claim whose `epsilon` is smaller contradicts itself.

        Raises
        ------
        MissingExtraError
            Without the extra ``dp-training``.
        """
        return spent_epsilon(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            delta=self.delta,
            accountant=self.accountant,
        )

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the fields as JSON scalars."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, object]) -> RecordPrivacy:
        """Return the claim of a mapping, trusting nothing in it but its form.

        Raises
        ------
        InvalidValueError
            If a field is missing, unknown, of the wrong type or out of range.
        """
        known = {spec.name for spec in dataclasses.fields(cls)}
        if set(plain) != known:
            raise InvalidValueError(f"a privacy claim has the fields {', '.join(sorted(known))}")
        if not isinstance(plain["accountant"], str):
            raise InvalidValueError("accountant is a name")
        return cls(**dict(plain))  # type: ignore[arg-type]

    def as_model_card(self) -> dict[str, str]:
        """Return rows for ``LocalModel(model_card=...)``, which the coordinator is shown.

        Numbers are written such that they read back exactly.
        """
        return {
            "record-dp-epsilon": repr(self.epsilon),
            "record-dp-delta": repr(self.delta),
            "record-dp-noise-multiplier": repr(self.noise_multiplier),
            "record-dp-sample-rate": repr(self.sample_rate),
            "record-dp-steps": repr(self.steps),
            "record-dp-max-grad-norm": repr(self.max_grad_norm),
            "record-dp-accountant": self.accountant,
            "record-dp-neighbours": "one record added or removed",
            "record-dp-status": "the site's own claim, not verified",
        }

"""Does honest work pay more? Every way to settle against every cheat.

Axes: K sites, N rows, T audits among them, C classes, S stages (seeds).

Attackers answer all rows, since they cannot tell which are audits; pay is settled on the
audits; harm is what the ensemble loses on all rows. A cheat with a model is played by every
site (or a sample of the parties of its size) in turn, so that no cell hangs on one lucky
attacker.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.attacks.cheating.base import CHEATS, Cheat, Cheated
from fedinfer_flower.attacks.cheating.settling import Settling, Stage
from fedinfer_flower.attacks.measures import student_quantile
from fedinfer_flower.errors import InvalidValueError

__all__ = [
    "FREE_RIDER_SHARE",
    "PaymentCell",
    "explained",
    "markdown_payment_table",
    "mean_interval",
    "payment_table",
]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FREE_RIDER_SHARE: Final = 0.02
"""Most of the pot that a free rider among six sites should get: an eighth of a fair share."""

FIGURES: Final = ("gain", "share", "rise", "harm")
"""What a cell holds of each stage."""

_EVEN: Final = 0.01
"""A gain or loss of at most this part is the same pay, however sure its sign is."""

_MAX_PARTIES: Final = 6
"""Parties of attackers that are played for a cheat and a stage."""


@dataclass(frozen=True, kw_only=True)
class PaymentCell:
    """One way to settle against one cheat; one number a stage in each tuple.

    Parameters
    ----------
    settling, cheat : str
    has_model : bool
        Whether attackers are honest sites that cheat; else free riders.
    share : tuple of float
        Attackers' share of the pot, a mean over parties.
    gain : tuple of float
        What attackers get over what they would get honestly, summed over parties; for free
        riders, who have nothing honest, over an equal share of the pot.
    rise : tuple of float
        Most that the share of any party of attackers grew by; for free riders, its share.
    harm : tuple of float
        What the accuracy of the mean probability lost, a mean over parties.
    """

    settling: str
    cheat: str
    has_model: bool
    share: tuple[float, ...]
    gain: tuple[float, ...]
    rise: tuple[float, ...]
    harm: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """``"honest"``, ``"even"`` or ``"attack"``: which pays more, by over 1 % and chance (95 %).

        Examples
        --------
        >>> cell = PaymentCell(settling="equal", cheat="clones", has_model=True, share=(0.3, 0.3),
        ...     gain=(1.67, 1.67), rise=(0.1, 0.1), harm=(0.0, 0.0))
        >>> cell.verdict
        'attack'
        """
        _, low, high = mean_interval(self.gain)
        if low > 1.0 + _EVEN:
            return "attack"
        return "honest" if high < 1.0 - _EVEN else "even"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, with means and 95 % intervals."""
        plain: dict[str, Any] = {
            "settling": self.settling,
            "cheat": self.cheat,
            "has_model": self.has_model,
            "verdict": self.verdict,
        }
        for name in FIGURES:
            mean, low, high = mean_interval(getattr(self, name))
            plain[name] = {"mean": mean, "low": low, "high": high}
        return plain


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by Student; of one value, that value thrice.

    Raises
    ------
    InvalidValueError
        If there is no value.

    Examples
    --------
    >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    if not len(values):
        raise InvalidValueError("a mean needs a value")
    mean, spread = float(np.mean(values)), float(np.std(values))
    if len(values) == 1 or spread == 0.0:
        return mean, mean, mean
    half = student_quantile(0.025, n_groups=len(values)) * spread / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _parties(cheat: Cheat, n_sites: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return who plays the cheat: every party of its size, or a sample of them."""
    everyone = list(itertools.combinations(range(n_sites), cheat.party_size))
    if not everyone:
        raise InvalidValueError(
            f"cheat {cheat.name!r} takes {cheat.party_size} of {n_sites} sites",
            hint="use more sites, or a smaller party",
        )
    if len(everyone) <= _MAX_PARTIES:
        return everyone
    chosen = rng.choice(len(everyone), _MAX_PARTIES, replace=False)
    return [everyone[int(n)] for n in np.sort(chosen)]


def _gain(after: Sequence[float], before: Sequence[float], fair: Sequence[float]) -> float:
    """Return what attackers get over what they would get; over a fair share if that is 0."""
    return sum(after) / (sum(before) or sum(fair))


def _accuracy(answers_knc: Array, labels_n: IntArray) -> float:
    return float((answers_knc.mean(axis=0).argmax(axis=-1) == labels_n).mean())


def _played(
    stage: Stage, cheat: Cheat, rng: np.random.Generator
) -> list[tuple[Cheated, Array, tuple[int, ...]]]:
    """Return the cheat by each party: what was forged, everybody's answers, the party's places."""
    honest = stage.answers.probabilities_ktc
    played = []
    for sites in _parties(cheat, len(honest), rng):
        cheated = cheat(honest, stage.labels_n, rng, sites=sites)
        joined, places = cheated.join(honest)
        played.append((cheated, joined, places))
    return played


def payment_table(
    settlings: Sequence[Settling],
    cheats: Sequence[Cheat],
    stages: Sequence[Stage],
    *,
    seed: int = 0,
) -> list[PaymentCell]:
    """Play every cheat on every stage, and settle it in every way.

    Parameters
    ----------
    settlings : sequence of Settling
    cheats : sequence of Cheat
    stages : sequence of Stage
        Independent ones: other splits, partitions, audits. Intervals are over these.
    seed : int
        Of the attackers' chance; all settlings see the same forgeries.

    Returns
    -------
    list of PaymentCell
        By settling, then by cheat.

    Raises
    ------
    InvalidValueError
        If there is nothing to play, or too few sites for a cheat.
    """
    if not (settlings and cheats and stages):
        raise InvalidValueError("a table needs a settling, a cheat and a stage")
    figures: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for number, stage in enumerate(stages):
        rng = np.random.default_rng([seed, number])
        honest = stage.answers.probabilities_ktc
        labels_t = stage.labels_n[stage.audits_t]
        base = [s.shares(honest, labels_t, stage.audits_t, one_owner=()) for s in settlings]
        whole = _accuracy(honest, stage.labels_n)
        for cheat in cheats:
            played = _played(stage, cheat, rng)
            harm = whole - float(np.mean([_accuracy(j, stage.labels_n) for _, j, _ in played]))
            for settling, untouched in zip(settlings, base, strict=True):
                after, before, fair = [], [], []
                for cheated, joined, party in played:
                    # Colluders are owners of their own; clones have the owner of their model.
                    owned = party if cheated.keeps else ()
                    shares = settling.shares(joined, labels_t, stage.audits_t, one_owner=owned)
                    after.append(float(shares[list(party)].sum()))
                    before.append(float(untouched[list(cheated.party)].sum()))
                    fair.append(len(party) / len(shares))
                rise = max(a - b for a, b in zip(after, before, strict=True))
                figures.setdefault((settling.label, cheat.name), []).append(
                    (float(np.mean(after)), _gain(after, before, fair), rise, harm)
                )
    models = {cheat.name: cheat.has_model for cheat in cheats}
    return [
        PaymentCell(
            settling=settling.label,
            cheat=cheat.name,
            has_model=models[cheat.name],
            **dict(
                zip(
                    ("share", "gain", "rise", "harm"),
                    zip(*figures[settling.label, cheat.name], strict=True),
                    strict=True,
                )
            ),
        )
        for settling, cheat in itertools.product(settlings, cheats)
    ]


def markdown_payment_table(cells: Sequence[PaymentCell], *, figure: str = "gain") -> str:
    """Return one figure of all cells as a Markdown table, a row for each way to settle.

    Gains and shares of cheats that pay more than honest work are bold; where chance leaves it
    open which pays more, or both pay the same, they have a tilde.

    Parameters
    ----------
    cells : sequence of PaymentCell
    figure : {"gain", "share", "rise", "harm"}

    Raises
    ------
    InvalidValueError
        If there is no such figure.

    Examples
    --------
    >>> cell = PaymentCell(settling="equal", cheat="clones", has_model=True, share=(0.3, 0.3),
    ...     gain=(1.67, 1.67), rise=(0.1, 0.1), harm=(0.0, 0.0))
    >>> print(markdown_payment_table([cell]))
    | gain | clones |
    |---|---|
    | equal | **1.67** |
    """
    if figure not in FIGURES:
        raise InvalidValueError(
            f"a cell has no figure {figure[:32]!r}", hint=f"use {', '.join(FIGURES)}"
        )
    cheats = list(dict.fromkeys(cell.cheat for cell in cells))
    lines = [f"| {figure} | {' | '.join(cheats)} |", "|---" * (len(cheats) + 1) + "|"]
    for settling in dict.fromkeys(cell.settling for cell in cells):
        row = {cell.cheat: cell for cell in cells if cell.settling == settling}
        texts = [_shown(row[cheat], figure) if cheat in row else "-" for cheat in cheats]
        lines.append(f"| {settling} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _shown(cell: PaymentCell, figure: str) -> str:
    mean, low, high = mean_interval(getattr(cell, figure))
    text = f"{mean:.2f}" if figure == "gain" else f"{mean:.3f}"
    if low != high:
        text += f" ± {high - mean:.2f}" if figure == "gain" else f" ± {high - mean:.3f}"
    if figure not in {"gain", "share"}:
        return text
    return {"attack": f"**{text}**", "even": f"~{text}"}.get(cell.verdict, text)


def explained(cells: Sequence[PaymentCell]) -> list[str]:
    """Return a line for each cheat that pays somewhere: where, why, and what stops it.

    Examples
    --------
    >>> cell = PaymentCell(settling="equal", cheat="clones", has_model=True, share=(0.3, 0.3),
    ...     gain=(1.67, 1.67), rise=(0.1, 0.1), harm=(0.0, 0.0))
    >>> explained([cell])[0].startswith("clones pays under equal: ")
    True
    """
    lines = []
    for name in dict.fromkeys(cell.cheat for cell in cells):
        where = [c.settling for c in cells if c.cheat == name and c.verdict == "attack"]
        if where:
            cheat = CHEATS.get(name)
            lines.append(
                f"{name} pays under {'; '.join(where)}: {cheat.pays_because}."
                f" Stopped by {cheat.stopped_by}."
            )
    return lines

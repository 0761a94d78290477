"""What `fedinfer refine` compares: sites, and one step for every way to answer."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.simulation.facts.checkpoints import NAMES
from fedinfer_flower.simulation.facts.federation import RefineStep
from fedinfer_flower.simulation.facts.preparation import Recipe
from fedinfer_flower.simulation.facts.sites import SitePlan

__all__ = ["CODECS", "MEDIA", "QUICK", "RefineOptions", "plan_sites", "plan_steps"]

MEDIA: Final = ("text", "cache")
CODECS: Final = ("bf16", "int8", "int4")
"""Encodings that are compared with the default, fixed 4-bit scales."""

QUICK: Final = Recipe(steps=150, documents=450, gate_documents=120)
"""A recipe for a first look: fusers of a third of the training."""

_QUICK_RECEIVER: Final = NAMES[0]


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """What `fedinfer refine` was asked for.

    Parameters
    ----------
    questions : int
        Of each kind from each institution; 0 for the default.
    media : tuple of str
        Of `MEDIA`.
    seed : int
        Of trainings, questions and documents.
    quick : bool
        One receiver, few questions, short trainings.
    in_process : bool
        Without Flower's engine: for tests.

    Raises
    ------
    InvalidValueError
    """

    questions: int = 0
    media: tuple[str, ...] = MEDIA
    seed: int = 0
    quick: bool = False
    in_process: bool = False

    def __post_init__(self) -> None:
        unknown = [medium for medium in self.media if medium not in MEDIA]
        if unknown or not self.media:
            raise InvalidValueError(
                f"no medium {unknown[0][:32]!r} here" if unknown else "no medium to compare",
                hint=f"--media {','.join(MEDIA)}, or one of them",
            )
        if self.questions < 0:
            raise InvalidValueError("questions are counted from 1")

    @property
    def each(self) -> int:
        """Questions of each kind from each institution."""
        return self.questions or (8 if self.quick else 30)

    @property
    def receivers(self) -> tuple[str, ...]:
        """Institutions that answer."""
        return (_QUICK_RECEIVER,) if self.quick else NAMES

    @property
    def recipe(self) -> Recipe:
        """How fusers and gates are trained."""
        base = QUICK if self.quick else Recipe()
        return Recipe(
            seed=self.seed,
            steps=base.steps,
            documents=base.documents,
            gate_documents=base.gate_documents,
        )

    def command(self) -> str:
        """Return the command that gives the same run."""
        parts = ["fedinfer", "refine", "--questions", str(self.each), "--seed", str(self.seed)]
        parts += ["--media", ",".join(self.media)] if self.media != MEDIA else []
        return shlex.join(parts + ["--quick"] * self.quick)


def plan_sites(options: RefineOptions, gates: Mapping[str, Path]) -> tuple[SitePlan, ...]:
    """Return the sites: institutions as they are, and again with other settings.

    Parameters
    ----------
    options : RefineOptions
    gates : mapping of str to Path
        Folders of gates, by receiver.
    """
    sites = [SitePlan(name=name, family=name) for name in NAMES]
    if "cache" not in options.media:
        return tuple(sites)
    sites += [
        SitePlan(name=_gated(name), family=name, gate=str(gates[name]))
        for name in options.receivers
    ]
    sites += [SitePlan(name=_control(name), family=name, misreads=True) for name in NAMES]
    if not options.quick:
        sites += [
            SitePlan(name=_coded(name, codec), family=name, gate=str(gates[name]), codecs=(codec,))
            for codec in CODECS
            for name in options.receivers
        ]
    return tuple(sites)


def plan_steps(options: RefineOptions) -> tuple[RefineStep, ...]:
    """Return one step for every way to answer, after two that only warm the sites up."""
    receivers = options.receivers
    last = options.media[-1]
    # A worker of the engine loads a site's model when it first serves the site.
    steps = [
        RefineStep(label=f"warm-up-{i}", receivers=receivers, sharers=NAMES, medium=last)
        for i in range(2)
    ]
    steps.append(RefineStep(label="alone", receivers=receivers))
    for medium in options.media:
        steps.append(
            RefineStep(label=f"{medium}-both", receivers=receivers, sharers=NAMES, medium=medium)
        )
        steps += [
            RefineStep(
                label=f"{medium}-{sharer}",
                receivers=tuple(name for name in receivers if name != sharer),
                sharers=(sharer,),
                medium=medium,
            )
            for sharer in NAMES
            if receivers != (sharer,)
        ]
    if "cache" in options.media:
        steps += _of_caches(options)
    return tuple(steps)


def _of_caches(options: RefineOptions) -> list[RefineStep]:
    receivers, others = options.receivers, tuple(_control(name) for name in NAMES)
    gated = tuple(_gated(name) for name in receivers)
    steps = [
        RefineStep(label="cache-gated", receivers=gated, sharers=NAMES, medium="cache"),
        RefineStep(label="control", receivers=receivers, sharers=others, medium="cache"),
    ]
    if options.quick:
        return steps
    steps.append(RefineStep(label="control-gated", receivers=gated, sharers=others, medium="cache"))
    steps.append(
        RefineStep(
            label="cache-verbatim",
            receivers=receivers,
            sharers=NAMES,
            medium="cache",
            rephrase="none",
        )
    )
    steps += [
        RefineStep(
            label=f"codec-{codec}",
            receivers=tuple(_coded(name, codec) for name in receivers),
            sharers=NAMES,
            medium="cache",
        )
        for codec in CODECS
    ]
    if options.media == MEDIA:
        steps.append(RefineStep(label="auto", receivers=gated, sharers=NAMES, medium="auto"))
    return steps


def _gated(name: str) -> str:
    return f"{name} with gate"


def _control(name: str) -> str:
    return f"{name} misreading"


def _coded(name: str, codec: str) -> str:
    return f"{name} in {codec}"

"""The demo's querier: one identity, and for every step keys that never leave this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.cli.demo_rewards import DemoRewards
from fedinfer_flower.cli.demo_selection import DemoSelection
from fedinfer_flower.errors import ConfigError
from fedinfer_flower.mpc.documents import MpcAnswer
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.querier import Querier
from fedinfer_flower.querier.encrypted_querier import EncryptedQuerier
from fedinfer_flower.querier.mpc_querier import MpcQuerier
from fedinfer_flower.query import Prediction
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.federation import ENCRYPTED_QUERY, MPC, Step
from fedinfer_flower.simulation.joint_sites import JointSetUp
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer
from fedinfer_flower.wire.identity import Identity

__all__ = ["DemoQueriers"]

_DEPTH: Final = 2
"""Affine layers of the largest network that answers encrypted queries."""


class DemoQueriers:
    """Ask and open every step of a demo.

    Parameters
    ----------
    steps : sequence of Step
    dataset : Dataset
        Its test inputs are asked.

    Attributes
    ----------
    rewards : DemoRewards, optional
        Asks the step that is settled.
    selection : DemoSelection, optional
        Chooses whom the main step asks.
    riders : tuple of str
        Names of sites that only the settled step asks.
    """

    def __init__(self, steps: Sequence[Step], dataset: Dataset) -> None:
        self.identity = Identity.generate()
        self.rewards: DemoRewards | None = None
        self.selection: DemoSelection | None = None
        self.riders: tuple[str, ...] = ()
        self._steps, self._dataset = steps, dataset
        self._encrypted = (
            EncryptedQuerier(depth=_DEPTH)
            if any(step.protection == ENCRYPTED_QUERY for step in steps)
            else None
        )
        self._joint: MpcQuerier | None = None
        self._queriers = {
            step.label: Querier(
                protection=make_protection(step.protection, step.options), identity=self.identity
            )
            for step in steps
            if step.protection not in (ENCRYPTED_QUERY, MPC)
        }

    @property
    def encrypted_key_id(self) -> str:
        """Fingerprint of the key under which queries are encrypted; empty without one."""
        return "" if self._encrypted is None else self._encrypted.key_id

    def seal(self, folder: Path, set_up: JointSetUp | None) -> None:
        """Write the job of every step, and then ``jobs.ready``."""
        directory = Directory.from_bytes((folder / "directory.fi").read_bytes())
        names = {card.profile.name for card in directory.cards} - set(self.riders)
        honest = directory.only(names) if self.riders else directory
        for step in self._steps:
            if step.grouped:
                self._selected().begin(honest, self.of(step))
                continue
            if step.settled:
                job = self._rewarded().ask(directory)
            else:
                job = self._job(step, honest, folder, set_up)
            (folder / f"{step.label}.job").write_bytes(job)
        write_whole(folder / "jobs.ready", b"")

    def of(self, step: Step) -> Querier:
        """Return who asks a step."""
        return self._queriers[step.label]

    def open(self, step: Step, folder: Path) -> Prediction:
        """Open the answer to a step."""
        if step.grouped:
            return self._selected().decide()
        data = (folder / f"{step.label}.answer").read_bytes()
        if step.protection == MPC:
            return self._asked_jointly().open(MpcAnswer.from_bytes(data))
        combined = CombinedAnswer.from_bytes(data)
        if step.protection == ENCRYPTED_QUERY:
            return self._asked_encrypted().open(combined)
        return self._queriers[step.label].open(combined)

    def totals(self, step: Step, folder: Path) -> npt.NDArray[np.float64] | None:
        """Return the mean logits themselves, under `MPC`."""
        if step.protection != MPC:
            return None
        answer = MpcAnswer.from_bytes((folder / f"{step.label}.answer").read_bytes())
        return self._asked_jointly().totals(answer).astype(np.float64)

    def _job(
        self, step: Step, directory: Directory, folder: Path, set_up: JointSetUp | None
    ) -> bytes:
        inputs, classes = self._dataset.test_inputs, self._dataset.classes
        if step.protection == MPC:
            if set_up is None:
                raise ConfigError("the sites have not agreed on who computes")
            self._joint = MpcQuerier(identity=self.identity, parties=set_up.parties)
            statements = [path.read_bytes() for path in sorted(folder.glob("statement-*.fi"))]
            return self._joint.ask(inputs, statements).to_bytes()
        if step.protection == ENCRYPTED_QUERY:
            return self._asked_encrypted().ask(inputs, classes=classes).to_bytes()
        querier = self._queriers[step.label]
        if not step.sealed:
            return querier.ask(inputs, clear=True, classes=classes).to_bytes()
        if self.selection is not None and step.label == self.selection.step.label:
            directory = self.selection.choose(directory, querier.protection)
        sealed = querier.ask(inputs, directory=directory, classes=classes, rule=step.rule)
        return sealed.to_bytes()

    def _selected(self) -> DemoSelection:
        if self.selection is None:
            raise ConfigError("no selector chooses for this demo")
        return self.selection

    def _rewarded(self) -> DemoRewards:
        if self.rewards is None:
            raise ConfigError("nothing is settled in this demo")
        return self.rewards

    def _asked_encrypted(self) -> EncryptedQuerier:
        if self._encrypted is None:
            raise ConfigError("no step of this demo is an encrypted query")
        return self._encrypted

    def _asked_jointly(self) -> MpcQuerier:
        if self._joint is None:
            raise ConfigError("no step of this demo was asked jointly")
        return self._joint

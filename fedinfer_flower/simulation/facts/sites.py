"""The institutions of the fact world as sites of a federation.

One institution can be there as several sites, with the same model, documents and fusers and
other settings: a gate, another encoding of caches. What is compared then differs in nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from fedinfer_flower.clients.language_state import LanguageSite
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.questions import (
    DocumentShelf,
    MisreadingPrompts,
    TrialQuestion,
)
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS

__all__ = ["FactInstitution", "SitePlan", "client_app", "write_documents"]


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One site.

    Parameters
    ----------
    name : str
    family : str
        Of `checkpoints.NAMES`: whose model and documents it has.
    gate : str
        Folder of its gate as receiver; empty for none.
    codecs : tuple of str
        How it takes and gives caches, the preferred first; empty for the default.
    misreads : bool
        Whether it shares what belongs to another question: a control, and no receiver.

    Examples
    --------
    >>> SitePlan(name="llama in int8", family="llama", codecs=("int8",)).policy().codecs
    ('int8',)
    """

    name: str
    family: str
    gate: str = ""
    codecs: tuple[str, ...] = ()
    misreads: bool = False

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> SitePlan:
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**plain, "codecs": tuple(plain["codecs"])})

    def policy(self) -> LanguagePolicy:
        """Return what the site agrees to: it helps with caches and with text."""
        policy = LanguagePolicy(cache=True, text=True, answers=not self.misreads)
        if not self.codecs:
            return policy
        return LanguagePolicy.from_mapping({**asdict(policy), "codecs": self.codecs})


def write_documents(folder: Path, questions: Sequence[TrialQuestion]) -> None:
    """Write one file an institution: its documents, each with the question it bears on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        held = [(q.question, q.document) for q in questions if q.holder == name and q.document]
        (folder / f"{name}.json").write_text(json.dumps(held))


class FactInstitution:
    """`load_model` of one site; Flower's engine pickles it.

    Parameters
    ----------
    plan : SitePlan
    documents : Path
        Folder of `write_documents`.
    """

    def __init__(self, plan: SitePlan, documents: Path) -> None:
        self.plan, self.documents = plan, documents

    def __call__(self, context: Context) -> LanguageSite:  # noqa: ARG002
        """Load the model, with the site's documents."""
        import torch

        # Several sites share the cores, and the models are small.
        torch.set_num_threads(1)
        held = json.loads((self.documents / f"{self.plan.family}.json").read_text())
        model = load(self.plan.family)
        if self.plan.misreads:
            world = FactWorld()
            known = world.facts(world.private[NAMES.index(self.plan.family)])
            others = [*held, *((fact.question(), "") for fact in known)]
            model.prompts = MisreadingPrompts(world.words, others)
            return LanguageSite(model=model)
        return LanguageSite(model=model, documents=DocumentShelf(held))


def client_app(plans: Sequence[SitePlan], *, documents: Path, fusers: Path) -> ClientApp:
    """Return an app for all sites: the site with partition id *i* is the *i*-th plan.

    Parameters
    ----------
    plans : sequence of SitePlan
    documents : Path
        Folder of `write_documents`.
    fusers : Path
        Folder of a `FuserBank`; a site uses those into its own model.
    """
    mods = [
        LanguageMod(
            FactInstitution(plan, documents),
            policy=plan.policy(),
            fusers=fusers,
            gate=Path(plan.gate) if plan.gate else None,
            name=plan.name,
            # All sites can be in one process.
            max_models=len(plans),
        )
        for plan in plans
    ]

    def handle(message: Message, context: Context) -> Message:
        return mods[int(context.node_config["partition-id"])].handle(message, context)

    app = ClientApp()
    for action in LANGUAGE_ACTIONS:
        app.query(action)(handle)
    return app

"""Three archives with documents that no model was trained on, and questions about them."""

import torch

from fedinfer_flower.clients.language_state import LanguageSite
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld

torch.set_num_threads(1)
WORLD = FactWorld()
RECEIVER, *ARCHIVES = NAMES
EACH = 20


def documents_of(name):
    """Facts with the documents that alone carry them; invented, so that nobody knows them."""
    people = WORLD.strangers_new[300 + 200 * NAMES.index(name) :][:200]
    found = WORLD.documents(EACH, people=people, statements=2, seed=7 + NAMES.index(name))
    # One question, one document.
    return list({(f.person, f.relation): (f, document) for f, document in found}.values())


def find_documents(name):
    """Return a site's search: from a question, in any wording, to documents that bear on it."""
    held = documents_of(name)

    def search(question):
        words = set(question.split())
        return [
            document
            for fact, document in held
            if {fact.relation, fact.person.first, fact.person.last} <= words
        ]

    return search


def load_site(context):
    name = NAMES[int(context.node_config["partition-id"])]
    return LanguageSite(model=load(name), documents=find_documents(name))

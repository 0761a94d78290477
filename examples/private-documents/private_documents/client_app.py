"""An archive: shares parts of caches, never text, and only for sealed questions of one querier."""

from functools import cache

from flwr.clientapp import ClientApp

from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS
from private_documents.task import NAMES, RECEIVER, load_site

# Entries of the last tokens only. `text` and `full_cache` stay off.
POLICY = LanguagePolicy(cache=True)


@cache
def language_mod(name, fusers, gate, querier):
    answers = name == RECEIVER
    return LanguageMod(
        load_site,
        policy=POLICY,
        name=name,
        fusers=fusers if answers else None,
        gate=gate if answers else None,
        require_seal=True,
        querier_key_ids={querier},
    )


app = ClientApp()
for action in LANGUAGE_ACTIONS:

    @app.query(action)
    def handle(message, context):
        # A real site writes fixed values here: the run config is the coordinator's.
        config, name = context.run_config, NAMES[int(context.node_config["partition-id"])]
        mod = language_mod(name, config["fusers"], config["gate"], config["querier"])
        return mod.handle(message, context)

"""An institution: a language model, what it shares, and the fusers it has as receiver."""

from functools import cache

from flwr.clientapp import ClientApp

from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS
from kv_refine.task import load_model, site_name

# Off by default: whoever gets a cache can learn more from it than the answer.
POLICY = LanguagePolicy(cache=True, text=True)


@cache
def language_mod(name, fusers):
    return LanguageMod(load_model, policy=POLICY, name=name, fusers=fusers or None)


app = ClientApp()
for action in LANGUAGE_ACTIONS:

    @app.query(action)
    def handle(message, context):
        # A real site writes fixed values here, and LanguageMod(...).attach(app) is enough.
        fusers = context.run_config["fusers"]
        return language_mod(site_name(context), fusers).handle(message, context)

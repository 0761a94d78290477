"""OpenAI's client, the gateway's own HTTP application and core, three small models: all real."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod
from fedinfer_flower.clients import language_state
from fedinfer_flower.clients.candidate_model import CandidateModel
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.core import GatewayCore
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS
from fedinfer_flower.wire.identity import Identity

openai = pytest.importorskip("openai")

WORLD = FactWorld()
FACT = WORLD.facts(WORLD.private[1])[0]
VALUES = sorted({FACT.value, *WORLD.values[next(iter(WORLD.values))]})
SITES = ("north", "east", "south")
REFINE = {"receiver": "north", "sharers": ["east"], "medium": "text", "rephrase": "none"}
MODELS = {
    "assistant": {"strategy": "refine", "strategy-options": REFINE},
    "vote": {"strategy": "mixture"},
    "writers": {
        "strategy": "decode",
        "protection": "secagg",
        "strategy-options": {"candidates": VALUES, "max-steps": 2},
    },
}
COMMON = {"kind": "language", "timeout-s": 60.0, "min-sites": 3}


def app_of() -> ClientApp:
    """Sites with a language model, which also scores candidates."""
    torch.set_num_threads(1)
    models = [load(name) for name in NAMES]
    policy = LanguagePolicy(text=True, share_speeds=False)
    app, language = ClientApp(), []
    for place, name in enumerate(SITES):

        def load_model(context: Any, place: int = place) -> Any:
            return models[place]

        load_model.__qualname__ = f"load_for_gateway_{name}"
        language.append(LanguageMod(load_model, policy=policy, name=name))
    classifier = InferenceMod(
        lambda context: CandidateModel(
            models[context.node_config["partition-id"]], VALUES
        ).local_model()
    )
    for action in ("fi_hello", "fi_predict", "fi_recover", "fi_ping"):
        app.query(action)(classifier.handle)
    for action in LANGUAGE_ACTIONS:

        @app.query(action)
        def handle(message: Any, context: Any) -> Any:
            return language[context.node_config["partition-id"]].handle(message, context)

    return app


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("gateway")
    folder.chmod(0o700)
    config = GatewayConfig.from_mapping(
        {
            "gateway": {"state": str(folder)},
            "models": {name: COMMON | table for name, table in MODELS.items()},
        }
    )
    keys = KeyStore(folder / "keys.db")
    key = keys.create("app", scopes=("chat",))
    with LocalGrid(app_of(), num_supernodes=3, workers=3) as grid:
        core = GatewayCore(config, grid, run_id=grid.run_id, identity=Identity.generate())
        core.start()
        app = create_app(core, config, keys=keys)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="critical", ws="none", lifespan="off")
        )
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        for _ in range(3000):
            if server.started and core.ready()[0]:
                break
            time.sleep(0.01)
        assert server.started
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as made:
            yield made
        server.should_exit = True
        thread.join(10)
        listener.close()
        core.close()
    keys.close()
    language_state.clear()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_chat(client: Any, model: str) -> None:
    said = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": FACT.question()}], max_tokens=4
    )

    provenance = said.model_extra["fedinfer"]["provenance"]
    assert said.choices[0].message.content.split()[0] in VALUES
    assert provenance["sites_answered"] == (2 if model == "assistant" else 3)
    if model == "assistant":
        assert said.choices[0].message.content == FACT.value
        assert said.model_extra["fedinfer"]["used"] == ["east"]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_streamed_responses_are_what_comes_at_once(client: Any, model: str) -> None:
    whole = client.responses.create(model=model, input=FACT.question())
    with client.responses.stream(model=model, input=FACT.question()) as stream:
        pieces = [e.delta for e in stream if e.type == "response.output_text.delta"]

    assert "".join(pieces) == whole.output_text
    assert len(pieces) >= 1


def test_a_question_beyond_a_models_window_is_an_error_of_the_client(client: Any) -> None:
    text = FACT.question() + " Q" * 5000

    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": text}]
        )

    assert caught.value.code.startswith("FI4")
    assert " Q Q" not in str(caught.value)

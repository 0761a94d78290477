"""Starts a federation on this machine, and a Flower agent whose model it is.

python run.py [FOLDER] [--question "..."]
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import StartRunRequest, StreamRunEventsRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient

from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.serving.server_app import KEYS_FILE, state_folder
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.wire.identity import Identity

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
SITES = ("north", "south")
POLICY = """\
[site]
name = "{name}"
home = "{name}-home"

[language]
loader = "sites:model"
text = true

[answers]
kinds = ["text"]
actions = ["hello", "ping", "introduce", "rephrase", "generate", "refine"]

[queriers]
gateway = "{gateway}"
"""
GATEWAY = """\
[gateway]
host = "127.0.0.1"
port = {port}
state = "gateway-state"

[models.assistant]
kind = "language"
strategy = "refine"
timeout-s = 120.0

[models.assistant.strategy-options]
receiver = "north"
sharers = ["south"]
medium = "text"
max-new-tokens = 8
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    world = FactWorld()
    # A fact that only south's model was taught; north answers, with south's help.
    fact = world.facts(world.private[1])[0]
    parser.add_argument("--question", default=fact.question())
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = answer(folder.resolve(), options.question, stack)
    print(json.dumps(found))  # noqa: T201


def answer(folder, question, stack):
    """Start everything below a folder, ask the agent, end everything."""
    state = state_folder(folder / "gateway-state")
    keys = KeyStore(state / KEYS_FILE)
    # Every app that the SuperLink's machine runs can read the key: let it do one thing.
    secret = keys.create("agents", scopes=["chat"], models=["assistant"], rows_per_minute=60)
    keys.close()
    gateway_id = Identity.load_or_create(state / "gateway.id").key_id
    link, port = free_port(), free_port()
    home = folder / "flwr"
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{link}"\n'
        "insecure = true\n"
    )
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }

    def start(name, *command, **more):
        log = stack.enter_context((folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=folder,
            env=environment | more,
            stdout=log,
            stderr=log,
        )
        stack.callback(end, process)
        return process

    started = [
        start(
            "superlink",
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link)),
            "--disable-runtime-dependency-installation",
            # All that it takes: Flower's model tasks ask the federation.
            FLWR_MODEL_API_ENDPOINT=f"http://127.0.0.1:{port}/v1/responses",
            FLWR_MODEL_API_KEY=secret,
        )
    ]
    wait_for(f"http://127.0.0.1:{link}/health", started)
    for name in SITES:
        policy = folder / f"{name}.toml"
        policy.write_text(POLICY.format(name=name, gateway=gateway_id))
        command = ("site", "up", "--policy", str(policy), "--superlink", f"127.0.0.1:{link}")
        started.append(start(name, "fedinfer", *command, "--insecure"))
    config = folder / "gateway.toml"
    config.write_text(GATEWAY.format(port=port))
    command = ("serve", "--config", str(config), "--superlink", f"127.0.0.1:{link}", "--insecure")
    started.append(start("gateway", "fedinfer", *command))
    wait_for(f"http://127.0.0.1:{port}/ready", started)
    return ask_agent(link, question)


def ask_agent(link, question):
    """Run the AgentApp with a prompt, as `flwr chat` does, and return what it says."""
    client = ControlHttpClient.from_server_address(
        server_address=f"127.0.0.1:{link}", insecure=True, root_certificates=None, interceptors=()
    )
    fab = build_fab_from_disk(HERE)
    run = client.StartRun(StartRunRequest(user_prompt=question, fab=Fab(content=fab)))
    said = {}
    for each in client.StreamRunEvents(StreamRunEventsRequest(run_id=run.run_id)):
        event = json.loads(each.task_event.data) if each.task_event.data else {}
        if event.get("type") == "message" and event.get("role") == "assistant":
            said = {"question": question, "answer": event["content"]}
            said["provenance"] = event["provenance"]
    return said


def wait_for(url, processes, timeout_s=180.0):
    """Wait until a server answers with 200."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if any(process.poll() is not None for process in processes):
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"{url} does not answer: see the logs")


def end(process):
    """End a process, and wait for it."""
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port():
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()

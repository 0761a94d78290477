"""Selection, rewards and payment on a SuperLink; the querier and its keys are in this process."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedinfer_flower import Directory, Identity, Querier, read_pins
from fedinfer_flower.incentives import AuditedAnswers, make_scheme
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.query import Prediction
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.verification import verify
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.settlement import (
    EvidenceForm,
    QuerierDesk,
    Settlement,
    SettlementRequest,
    mix_audits,
    site_evidence,
)
from fedinfer_flower.settlement.audits import AuditMix
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.documents import CombinedAnswer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

N_SITES, FREE_RIDER, SMALL_SITE = 5, 4, 3
ASKED = (0, 1, 2, FREE_RIDER)
"""All but the small one: four are asked, and it adds least to the classes covered."""

NODES = [f"partition-id={site} num-partitions={N_SITES}" for site in range(N_SITES)]

RNG = np.random.default_rng(33)
AUDIT_ROWS = RNG.standard_normal((90, 3))
AUDIT_LABELS = AUDIT_ROWS.argmax(axis=1)
CANARY = np.array([12.34375, -7.15625, 3.03125])
ROWS = np.concatenate([RNG.standard_normal((30, 3)), CANARY[None]])

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "settle-app"
version = "1.0.0"
description = "Five clinics that are paid for what they add."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "settle_app.server_app:app"
clientapp = "settle_app.client_app:app"

[tool.flwr.app.config]
exchange = ""
folder = ""
homes = ""
querier = ""
"""

SITES = '''\
"""Clinics 0 to 3 know the classes, each less than the one before; clinic 4 knows nothing."""

import numpy as np

CLASSES = ("a", "b", "c")
COUNTS = {site: dict.fromkeys(CLASSES, 2 if site == 3 else 40) for site in range(5)}


def logits_of(site, rows):
    if site == 4:
        return np.tile([4.0, 0.0, 0.0], (len(rows), 1))
    noise = np.random.default_rng(site).standard_normal((3, 3))
    return np.asarray(rows, dtype=float) @ (2.0 * np.eye(3) + 0.3 * site * noise)
'''

CLIENT = """\
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from settle_app.sites import CLASSES, COUNTS, logits_of


def load_model(context):
    site = int(context.node_config["partition-id"])
    return LocalModel(
        model=lambda rows: logits_of(site, rows),
        classes=CLASSES,
        class_counts=COUNTS[site],
        outputs="logits",
        digest=f"clinic {site}",
    )


app = InferenceMod(
    load_model,
    share_counts="counts",
    require_seal=True,
    agrees_to=("settlement",),
    # A real site writes a fixed path here: the run config is the coordinator's.
    home=lambda context: context.run_config["homes"],
).attach(ClientApp())
"""

SERVER = '''\
import time
from pathlib import Path

from flwr.serverapp import ServerApp

from fedinfer_flower import FedEnsemble, Handover, Identity
from fedinfer_flower.incentives import make_scheme
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.query import Deadline
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.settlement import SettlementDesk, SettlementReply
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.strategies.treasurer import Treasurer
from fedinfer_flower.wire.identity import PublicIdentity
from fedinfer_flower.wire.records import packed_bytes

FEE = 1_000_000
app = ServerApp()


class Overheard:
    """Flower's grid; keeps all that passes the coordinator in a file."""

    def __init__(self, grid, path):
        self._grid, self._path = grid, path

    def __getattr__(self, name):
        return getattr(self._grid, name)

    def push_messages(self, messages):
        return self._grid.push_messages(self._kept(messages))

    def pull_messages(self, message_ids):
        return self._kept(self._grid.pull_messages(message_ids))

    def _kept(self, messages):
        messages = list(messages)
        with self._path.open("ab") as file:
            for message in messages:
                if message.has_content():
                    file.write(packed_bytes(message.content))
        return messages


def wait_for(path):
    end = time.monotonic() + 200.0
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path.name)
        time.sleep(0.1)
    return path.read_bytes()


@app.main()
def main(grid, context):
    coordinate(grid, context.run_config)


def coordinate(grid, config):
    folder, exchange = Path(config["folder"]), Handover(Path(config["exchange"]))
    folder.mkdir()
    querier = PublicIdentity.from_bytes(bytes.fromhex(config["querier"]))
    ledger = Ledger(f"sqlite:///{folder}/ledger.db")
    ledger.migrate()
    ledger.deposit("registry", 2 * FEE, key="invoice-1")
    history = SiteHistory.load(folder / "history.json", missing_ok=True)
    me = Identity.load_or_create(folder / "coordinator.id")
    treasurer = Treasurer(ledger, identity=me, history=history)
    strategy = FedEnsemble(
        protection="secagg",
        evidence=True,
        selector="coverage-greedy",
        gates=["quorum"],
        history=history,
        max_query_nodes=4,
        min_available_nodes=5,
        patience_s=200.0,
        deadline=Deadline(timeout_s=200.0, quorum=4),
    )
    grid = Overheard(grid, folder / "overheard.bin")

    exchange.publish(strategy.directory(grid))
    job = exchange.wait_for_job(timeout_s=200.0)
    treasurer.take(
        job.job_id,
        "registry",
        fee=FEE,
        n_batches=len(job.batches),
        deadline_s=600.0,
        querier_key_id=querier.key_id,
    )
    result = strategy.start(grid, job)
    exchange.deliver(result)
    print(result.plan.summary(), result.summary(), sep="\\n", flush=True)

    scheme = make_scheme("audited-blend")
    desk = SettlementDesk(result.evidence, scheme=scheme, querier=querier)
    write_whole(exchange.folder / "settlement-request.fi", desk.request().to_bytes())
    reply = SettlementReply.from_bytes(wait_for(exchange.folder / "settlement-reply.fi"))
    settlement = desk.finish(reply)
    treasurer.pay(settlement, [result.receipt])
    history.save(folder / "history.json")
    write_whole(exchange.folder / "settlement.fi", settlement.to_bytes())
'''

IN_PROCESS = """\
import json, sys
sys.path.insert(0, ".")
from fedinfer_flower.simulation.local_grid import LocalGrid
from settle_app.client_app import app
from settle_app.server_app import coordinate
config = json.loads(sys.argv[1])
with LocalGrid(app, num_supernodes=5, run_config=config) as grid:
    coordinate(grid, config)
"""


class Federation:
    """Folders of one federation, keys compared out of band, and a querier that asks it once.

    Parameters
    ----------
    folder : Path
        ``site`` holds the sites' homes, everything else what the coordinator holds or reads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.me = Identity.generate()
        homes = folder / "site" / "homes"
        self.key_ids = [
            Identity.load_or_create(homes / f"partition-{k}" / "identity.json").key_id
            for k in range(N_SITES)
        ]
        pins = ["[sites]", *(f'site-{k} = "{key}"' for k, key in enumerate(self.key_ids))]
        pins += ["[queriers]", f'registry = "{self.me.key_id}"']
        (homes / "pins.toml").write_text("\n".join(pins))
        self.pins = read_pins(homes / "pins.toml")
        self.exchange, self.coordinator = folder / "exchange", folder / "coordinator"
        self.config = {
            "exchange": str(self.exchange),
            "folder": str(self.coordinator),
            "homes": str(homes),
            "querier": self.me.public.to_bytes().hex(),
        }

    def ask(self, process: subprocess.Popen[bytes]) -> Deal:
        """Play the querier against a coordinator in `process`, and see it end well."""
        querier = Querier(protection="secagg", identity=self.me, pins=self.pins)
        directory = Directory.from_bytes(self._wait_for("directory.fi", process))
        mix = mix_audits(ROWS, AUDIT_ROWS, AUDIT_LABELS)
        job = querier.ask(mix.inputs, directory=directory, rule="mean-probability", evidence=True)
        write_whole(self.exchange / "job.fi", job.to_bytes())
        answer = CombinedAnswer.from_bytes(self._wait_for("answer.fi", process))
        request = SettlementRequest.from_bytes(self._wait_for("settlement-request.fi", process))
        desk = QuerierDesk(
            request,
            scheme=make_scheme("audited-blend"),
            asked={batch.query_id: batch.n_queries for batch in job.batches},
            form=EvidenceForm.SHARES,
            sites=[card.identity for card in directory.cards],
            identity=self.me,
            min_sites=len(ASKED),
            # Exact, to be compared with the sums in clear.
            noise_std=0.0,
        )
        (batch,) = job.batches
        desk.check_against_answer({batch.query_id: querier.totals(answer)})
        reply = desk.settle(mix.located(job.job_id, batch_size=1024))
        write_whole(self.exchange / "settlement-reply.fi", reply.to_bytes())
        settlement = Settlement.from_bytes(self._wait_for("settlement.fi", process))
        assert process.wait(timeout=120) == 0, self.log()
        return Deal(
            federation=self,
            directory=directory,
            mix=mix,
            prediction=querier.open(answer),
            request=request,
            settlement=settlement,
        )

    def by_site(self, values: dict[str, float]) -> np.ndarray:
        """Return values by key id in the order of `ASKED`; each must be there, and no other."""
        assert set(values) == {self.key_ids[k] for k in ASKED}
        return np.array([values[self.key_ids[k]] for k in ASKED])

    def log(self) -> str:
        """The last of what was printed to the logs of this federation."""
        logs = sorted(self.folder.rglob("*.log"))
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def held_by_coordinator(self) -> bytes:
        """All that is on the coordinator's disks: files, logs, and what passed its grid."""
        folders = [folder for folder in self.folder.iterdir() if folder.name != "site"]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return b"\0".join(path.read_bytes() for path in files)

    def _wait_for(self, name: str, process: subprocess.Popen[bytes]) -> bytes:
        path, end = self.exchange / name, time.monotonic() + 240.0
        while not path.exists():
            assert process.poll() is None or path.exists(), self.log()
            assert time.monotonic() < end, f"no {name}\n{self.log()}"
            time.sleep(0.1)
        return path.read_bytes()


@dataclass(frozen=True)
class Deal:
    """What came of it."""

    federation: Federation
    directory: Directory
    mix: AuditMix
    prediction: Prediction
    request: SettlementRequest
    settlement: Settlement


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settle-app")
    package = folder / "settle_app"
    package.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    texts = {"__init__": "", "sites": SITES, "client_app": CLIENT, "server_app": SERVER}
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def probabilities(app: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Sites' answers worked out here, shape (len(ASKED), n_queries, 3)."""
    sites = SimpleNamespace(**runpy.run_path(str(app / "settle_app" / "sites.py")))

    def of(rows: np.ndarray) -> np.ndarray:
        logits = np.stack([sites.logits_of(k, rows) for k in ASKED])
        exp = np.exp(logits - logits.max(axis=2, keepdims=True))
        return exp / exp.sum(axis=2, keepdims=True)

    return of


@pytest.fixture(scope="module")
def deployed(
    running, superlink, supernodes, app: Path, tmp_path_factory: pytest.TempPathFactory
) -> Deal:
    """A SuperLink with its state on disk, five SuperNodes, and `flwr run`."""
    federation = Federation(tmp_path_factory.mktemp("deployed"))
    home, nodes = federation.folder / "superlink", federation.folder / "site" / "supernodes"
    home.mkdir()
    nodes.mkdir()
    config = " ".join(f'{name}="{value}"' for name, value in federation.config.items())
    command = ("flwr", "run", ".", "here", "--stream", "--run-config", config)
    with (
        superlink(home, "--database", str(home / "state.db")) as port,
        supernodes(port, *NODES, home=nodes),
        running(*command, home=home, cwd=app) as process,
    ):
        return federation.ask(process)


@pytest.fixture(scope="module")
def in_process(running, app: Path, tmp_path_factory: pytest.TempPathFactory) -> Deal:
    """The same app on `LocalGrid`, in another process than the querier."""
    federation = Federation(tmp_path_factory.mktemp("in-process"))
    home = federation.folder / "superlink"
    home.mkdir()
    command = (sys.executable, "-c", IN_PROCESS, json.dumps(federation.config))
    with running(*command, home=home, cwd=app) as process:
        return federation.ask(process)


def test_settlement_is_that_of_all_answers_in_clear(deployed: Deal, probabilities) -> None:
    clear = AuditedAnswers(probabilities_ktc=probabilities(AUDIT_ROWS), labels=AUDIT_LABELS)
    expected = make_scheme("audited-blend").contributions(clear)

    values = deployed.federation.by_site(deployed.settlement.values)
    # Fixed point of the evidence, over 90 audits.
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert deployed.settlement.n_audits == len(AUDIT_ROWS)
    assert values[0] == max(values) > 0.1
    assert values[ASKED.index(FREE_RIDER)] == pytest.approx(0.0, abs=1e-4)


def test_simulation_settles_as_the_deployment_does(deployed: Deal, in_process: Deal) -> None:
    simulated = in_process.federation.by_site(in_process.settlement.values)
    values = deployed.federation.by_site(deployed.settlement.values)

    # Shares are exact; only the order of the audits, which is secret, sums floats otherwise.
    np.testing.assert_allclose(values, simulated, rtol=0.0, atol=1e-9)
    np.testing.assert_array_equal(
        deployed.mix.without(deployed.prediction.labels),
        in_process.mix.without(in_process.prediction.labels),
    )


def test_answer_is_the_mean_of_the_sites_that_were_chosen(deployed: Deal, probabilities) -> None:
    expected = probabilities(ROWS).mean(axis=0)
    found = deployed.mix.without(deployed.prediction.probabilities)

    # Scores are rounded to 2**-16 a site.
    np.testing.assert_allclose(found, expected, atol=2**-16)
    assert {card.profile.name for card in deployed.directory.cards} == {f"site-{k}" for k in ASKED}


def test_free_rider_is_paid_nothing_and_the_books_balance(deployed: Deal) -> None:
    federation = deployed.federation
    ledger = Ledger(f"sqlite:///{federation.coordinator}/ledger.db")
    paid = {k: ledger.balance(f"site:{federation.key_ids[k][:16]}") for k in range(N_SITES)}

    assert ledger.verify().ok
    assert paid[FREE_RIDER] == paid[SMALL_SITE] == 0
    assert min(paid[k] for k in (0, 1, 2)) > 0
    assert sum(paid.values()) + ledger.balance("registry") == 2_000_000
    assert ledger.balance("registry") == 1_000_000


def test_coordinator_remembers_who_answered_and_who_earned(deployed: Deal) -> None:
    federation = deployed.federation
    history = SiteHistory.load(federation.coordinator / "history.json")

    assert set(history.records) == {federation.key_ids[k] for k in ASKED}
    assert all(len(record.latencies_s) == 1 for record in history.records.values())
    good, bad = (history[federation.key_ids[k]].reputation for k in (0, FREE_RIDER))
    assert (good, bad) == ((2.0, 1.0), (1.0, 2.0))


def test_receipt_names_the_sites_that_answered_and_verifies(deployed: Deal) -> None:
    federation = deployed.federation
    data = (federation.exchange / "receipt.json").read_bytes()
    found = verify(data, pins=dict(federation.pins.sites), queriers=dict(federation.pins.queriers))

    found.require_ok()
    assert {check.name for check in found.not_checked} <= {"coordinator"}
    signers = {s.statement.site_key_id for s in Receipt.from_bytes(data).statements}
    assert signers == {federation.key_ids[k] for k in ASKED}


def floats_of(rows: Iterable[np.ndarray]) -> list[bytes]:
    """Return the bytes of rows in both float formats."""
    return [row.astype(dtype).tobytes() for row in rows for dtype in ("<f4", "<f8")]


def evidence_of(rows: np.ndarray) -> bytes:
    return site_evidence(
        EvidenceForm.CLEAR, rows, querier=None, evidence_key=b"", identity=None, query_id="q-0"
    )


def telling(answers: np.ndarray) -> list[np.ndarray]:
    """Leave out answers that are nearly one-hot: their bytes are mostly zeros, as in any file."""
    return [row for row in answers.reshape(-1, answers.shape[-1]) if row.min() > 0.01]


def test_coordinator_holds_no_question_and_no_single_answer(
    deployed: Deal, in_process: Deal, probabilities
) -> None:
    answers = telling(probabilities(ROWS))
    rows = floats_of([*ROWS, *AUDIT_ROWS, *answers]) + [evidence_of(row[None]) for row in answers]

    for deal in (deployed, in_process):
        overheard = (deal.federation.coordinator / "overheard.bin").read_bytes()
        # What it is searched in holds the sites' messages, with their sealed halves.
        assert all(bytes(deal.request.half(k, 0)) in overheard for k in range(len(ASKED)))
        held = deal.federation.held_by_coordinator()
        assert not [row for row in rows if row in held]
        keys = deal.federation.me.to_secret().values()
        assert not [key for key in keys if key.encode() in held or bytes.fromhex(key) in held]


def test_search_finds_questions_and_answers_that_are_in_clear(
    deployed: Deal, probabilities
) -> None:
    inputs = deployed.mix.inputs
    answers = probabilities(inputs)
    asked = Querier(protection="plain").ask(inputs, clear=True).to_bytes()

    assert len(telling(probabilities(ROWS))) > len(ASKED) * 5
    assert all(row.astype("<f8").tobytes() in asked for row in [*inputs, CANARY])
    for of_site in answers:
        evidence = evidence_of(of_site)
        assert all(evidence_of(row[None]) in evidence for row in telling(of_site))

"""The consortium's office: relays what it cannot read, settles, pays, and remembers."""

import dataclasses
import time

from flwr.serverapp import ServerApp

from fedinfer_flower import FedEnsemble, Handover, Identity, read_pins
from fedinfer_flower.errors import LedgerError, UntrustedKeyError
from fedinfer_flower.incentives.ledger import Status
from fedinfer_flower.incentives.payments import MICRO
from fedinfer_flower.selection import SiteHistory
from fedinfer_flower.selection.gates import make_gate
from fedinfer_flower.settlement import SettlementDesk, SettlementReply
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.strategies.treasurer import Treasurer
from hospital_consortium.places import Places, wait_for
from hospital_consortium.terms import PAYMENT, PRIOR_AUDITS, SCHEME, fee_for

app = ServerApp()
FLOOR = 0.4  # a newcomer stands at 0.5, and one epoch without merit leaves 0.33


@app.main()
def main(grid, context):
    config = context.run_config
    places, number = Places(config["state"]), config["round"]
    pins = read_pins(places.office / "pins.toml")
    me = Identity.load_or_create(places.office / "office.id")
    history = SiteHistory.load(places.office / "history.json", missing_ok=True)
    treasurer = Treasurer(
        places.ledger(),
        identity=me,
        payment=PAYMENT,
        history=history,
        account_of={key_id: name for name, key_id in pins.sites.items()}.__getitem__,
        prior_audits=PRIOR_AUDITS,
    )
    gate = make_gate("reputation", {"floor": FLOOR})
    strategy = FedEnsemble.from_run_config(config, gates=[gate], history=history)
    exchange = Handover(places.round(number))

    directory = strategy.directory(grid)
    say(strategy.chosen.plan.summary())
    exchange.publish(directory)
    job = exchange.wait_for_job(timeout_s=120.0)
    if job.querier.key_id not in pins.queriers.values():
        raise UntrustedKeyError("a job by a querier that the office does not know")
    fee = fee_in_escrow(treasurer.escrow, job, directory)
    say(f"{fee / MICRO:.2f} credits are in escrow: asking {len(directory.cards)} hospitals")
    if config["crash"]:
        raise RuntimeError("the office crashes")

    result = strategy.start(grid, job)
    if result.receipt is None:
        raise LedgerError("the hospitals signed nothing that could be paid for")
    receipt = result.receipt.signed_by(me)
    exchange.deliver(dataclasses.replace(result, receipt=receipt))
    settlement = settle(exchange.folder, result.evidence, job.querier)
    treasurer.pay(settlement, [receipt])
    # After the pay: the registry looks at both.
    write_whole(exchange.folder / "settlement.fi", settlement.to_bytes())
    history.save(places.office / "history.json")
    say("settled, paid and remembered")


def fee_in_escrow(escrow, job, directory):
    """Require the hospitals' price in escrow, for long enough: nobody answers on trust."""
    state = escrow.state(job.job_id)
    if state is None or state.status is not Status.OPEN:
        raise LedgerError("there is no fee in escrow for this job")
    if state.querier_key_id != job.querier.key_id or state.fee < fee_for(directory, job.n_queries):
        raise LedgerError("the fee in escrow is another querier's, or less than the price")
    if state.deadline < time.time():
        raise LedgerError("the fee in escrow could be refunded at any time")
    return state.fee


def settle(folder, evidence, querier):
    """Ask the querier which rows were audits, and open one sum a hospital."""
    # A query must not be settled twice. This book, with all shares in it, ends with this run.
    desk = SettlementDesk(evidence, scheme=SCHEME, querier=querier)
    write_whole(folder / "settlement-request.fi", desk.request().to_bytes())
    reply = wait_for(folder / "settlement-reply.fi", until=time.time() + 120)
    return desk.finish(SettlementReply.from_bytes(reply))


def say(text):
    print(text, flush=True)  # noqa: T201

"""The ledger: double entry, hash-chained, append-only; escrow on top of it."""

from fedinfer_flower.incentives.ledger.entry import Entry, Head, Posting
from fedinfer_flower.incentives.ledger.escrow import Escrow
from fedinfer_flower.incentives.ledger.exporting import read_export
from fedinfer_flower.incentives.ledger.ledger import Ledger
from fedinfer_flower.incentives.ledger.payees import Payee
from fedinfer_flower.incentives.ledger.stakes import Stakes
from fedinfer_flower.incentives.ledger.states import EscrowState, Outcome, Status
from fedinfer_flower.incentives.ledger.verification import BadRow, Verification, verify_entries

__all__ = [
    "BadRow",
    "Entry",
    "Escrow",
    "EscrowState",
    "Head",
    "Ledger",
    "Outcome",
    "Payee",
    "Posting",
    "Stakes",
    "Status",
    "Verification",
    "read_export",
    "verify_entries",
]

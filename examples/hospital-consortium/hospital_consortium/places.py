"""Where each party keeps its files, and where all of them look."""

import time
from pathlib import Path

from fedinfer_flower.errors import QueryError
from fedinfer_flower.incentives.ledger import Ledger


class Places:
    """Folders of one federation; in a real one they are on three kinds of machines."""

    def __init__(self, state):
        self.hospitals = Path(state) / "hospitals"  # a home for each, for its key
        self.office = Path(state) / "office"  # the coordinator's key, pins and memory
        self.registry = Path(state) / "registry"  # the querier's key and pins
        self.shared = Path(state) / "shared"  # files that go to and fro
        self.ledger_file = self.shared / "ledger.db"

    def ledger(self):
        return Ledger(f"sqlite:///{self.ledger_file}")

    def round(self, number):
        folder = self.shared / f"round-{number}"
        folder.mkdir(exist_ok=True)
        return folder


def wait_for(path, *, until):
    """Return the bytes of a file once it is there; `until` is in seconds since 1970."""
    while not path.exists():
        if time.time() > until:
            raise QueryError(f"no {path.name} came in time")
        time.sleep(0.1)
    return path.read_bytes()

"""`flower-supernode`, warm: short looks, a bounded wait for its worker, one request a task.

``python -m fedinfer_flower.clients.warm_supernode --status supernode.json -- --superlink HOST:PORT
--root-certificates ca.crt --isolation process --host 127.0.0.1 --port 9094``. Everything after
``--`` is as for `flower-supernode`.

Beside speed it mends what a stock SuperNode lacks: the wait for a reply ends, with an error reply,
when the message's time is up or the worker is lost, so that the next message is served.

Exit codes: those of `flower-supernode`; 78 (`EXIT_CONFIG`) for what a restart does not mend.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from fedinfer_flower.clients.worker_key import read_or_make_key
from fedinfer_flower.clients.worker_status import StatusFile
from fedinfer_flower.errors import ConfigError, DeploymentError
from fedinfer_flower.flower_internals import require_flower
from fedinfer_flower.observability.json_logs import configure_json_logs

__all__ = ["EXIT_CONFIG", "check_arguments", "main"]

log = logging.getLogger("fedinfer_flower.site")

EXIT_CONFIG: Final = 78
_NOT_ACTIVATED: Final = "[code: 2004]"

_WATCHED: Final = ("--isolation", "--superexec-auth-secret-file", "--host")


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments of `flower-supernode` with which nothing would be warm.

    Raises
    ------
    DeploymentError
        Naming the argument.

    Examples
    --------
    >>> check_arguments(["--insecure", "--isolation", "process"])
    """
    given = [part for argument in arguments for part in argument.split("=", 1)]
    for name in given:
        # argparse takes the beginning of an option's name for the option.
        if name.startswith("--") and any(n != name and n.startswith(name) for n in _WATCHED):
            raise DeploymentError(f"{name[:64]!r} is the beginning of an option: write it out")
    pairs = list(pairwise(given))
    # All of them: of several the last one counts.
    if {value for name, value in pairs if name == "--isolation"} != {"process"}:
        raise DeploymentError(
            "a warm SuperNode needs a worker beside it", hint="-- ... --isolation process"
        )
    if "--superexec-auth-secret-file" in given:
        raise DeploymentError(
            "the resident worker does not use Flower's SuperExec secret",
            hint="--worker-key FILE, the same for both",
        )
    for host in (value for name, value in pairs if name == "--host"):
        if host not in {"127.0.0.1", "localhost", "::1"}:
            raise DeploymentError(
                "tasks would be handed out beyond this machine, unencrypted",
                hint="--host 127.0.0.1",
            )


class _Refusals(logging.Handler):
    """Says why a SuperLink may refuse a node: Flower has one message for all reasons."""

    def emit(self, record: logging.LogRecord) -> None:
        if _NOT_ACTIVATED in record.getMessage():
            log.error(
                "the SuperLink refuses this node: its key is not registered there"
                " (flwr supernode register KEY.pub), or a SuperNode with this key is online, or"
                " was killed less than a minute ago"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a warm SuperNode until it is told to end."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, flower = given, []
    if "--" in given:
        at = given.index("--")
        own, flower = given[:at], given[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m fedinfer_flower.clients.warm_supernode",
        epilog="After --: the arguments of flower-supernode, with --isolation process.",
    )
    parser.add_argument("--status", required=True, type=Path, metavar="FILE")
    parser.add_argument("--worker-key", type=Path, metavar="FILE", help="made if it is not there")
    options = parser.parse_args(own)
    status = StatusFile(options.status, role="supernode")
    status.start()
    try:
        require_flower()
        check_arguments(flower)
        key = read_or_make_key(options.worker_key) if options.worker_key else ""
        from fedinfer_flower.flower_internals.warm_node import run_warm_node

        if "--host" not in " ".join(flower):
            flower = [*flower, "--host", "127.0.0.1"]
        logging.getLogger("flwr").addHandler(_Refusals())
        run_warm_node(flower, watch=status, key=key)
    except ConfigError as exc:
        log.error("%s", exc)
        return EXIT_CONFIG
    finally:
        status.close()
    return 0


if __name__ == "__main__":
    configure_json_logs()
    # httpx logs every request at INFO.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.exit(main())

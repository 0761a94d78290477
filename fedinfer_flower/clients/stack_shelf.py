"""The stacks that a site has checked and kept; it answers with no others.

A site with a home folder keeps them there, one without in Flower's context, for the run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final, cast

from flwr.app import ConfigRecord, Context

from fedinfer_flower.ensemble.base import RULES, Disclosure
from fedinfer_flower.ensemble.fitted import UNTRAINED, FittedAggregator, remember, require_digest
from fedinfer_flower.ensemble.stack_participation import check_participation
from fedinfer_flower.ensemble.stack_rule import StackRule
from fedinfer_flower.errors import CapacityError, InvalidValueError, LabelSpaceError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.wire.messages import Question

__all__ = ["MAX_STACKS", "MAX_STACK_BYTES", "bring_stack", "keep_stack", "kept_stack"]

MAX_STACKS: Final = 64
"""Kept at a site; then the oldest goes. So nobody can fill the shelf for good."""

MAX_STACK_BYTES: Final = 32 << 20

_RECORD: Final = "fedinfer-stacks"
_FOLDER: Final = "stacks"


def keep_stack(fitted: FittedAggregator, context: Context, folder: Path | None) -> None:
    """Keep an aggregator that the site has checked.

    Raises
    ------
    CapacityError
        If it is larger than `MAX_STACK_BYTES`.
    """
    data = fitted.to_bytes()
    if len(data) > MAX_STACK_BYTES:
        raise CapacityError(
            f"a stack of {len(data)} bytes; this site keeps up to {MAX_STACK_BYTES}"
        )
    if folder is None:
        record = cast(ConfigRecord, context.state.setdefault(_RECORD, ConfigRecord()))
        record.pop(fitted.digest, None)
        for digest in list(record)[: max(len(record) + 1 - MAX_STACKS, 0)]:
            del record[digest]
        record[fitted.digest] = data
        return
    shelf = folder / _FOLDER
    shelf.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = sorted((p for p in shelf.iterdir() if not p.suffix), key=lambda p: p.stat().st_mtime)
    others = [path for path in kept if path.name != fitted.digest]
    for path in others[: max(len(others) + 1 - MAX_STACKS, 0)]:
        path.unlink(missing_ok=True)
    path = shelf / fitted.digest
    draft = path.with_suffix(".new")
    draft.write_bytes(data)
    draft.replace(path)  # whole or not at all


def kept_stack(digest: str, context: Context, folder: Path | None) -> FittedAggregator:
    """Return an aggregator that the site keeps.

    Raises
    ------
    InvalidValueError
        If it keeps none of that digest, or the file is damaged.
    """
    data = b""
    if folder is None:
        record = context.state.get(_RECORD)
        if isinstance(record, ConfigRecord):
            data = cast(bytes, record.get(digest, b""))
    else:
        with contextlib.suppress(FileNotFoundError):
            data = (folder / _FOLDER / digest).read_bytes()
    if not data:
        raise InvalidValueError(
            "this site does not keep the stack that the query names",
            hint="train it with this site, which keeps it for the run or in its home",
        )
    fitted = FittedAggregator.from_bytes(data)
    if fitted.digest != digest:
        raise InvalidValueError("the stack that this site keeps under that name is damaged")
    return fitted


def bring_stack(asked: Question, context: Context, folder: Path | None) -> None:
    """Make the stack that a question names known in this process, from the site's own shelf.

    Nothing happens for rules without a stack.

    Raises
    ------
    FedInferError
        If the site does not keep it, or it is of another label space.
    """
    digest = asked.rule_options.get("stack", UNTRAINED)
    if not issubclass(RULES.get(asked.rule), StackRule) or digest == UNTRAINED:
        return
    require_digest(str(digest))
    fitted = kept_stack(str(digest), context, folder)
    if fitted.classes != asked.classes:
        raise LabelSpaceError(
            "the query's classes are not those of the stack, in its order",
            hint="ask with classes=fitted.classes",
        )
    protection = make_protection(asked.protection, dict(asked.protection_options))
    if protection.reveals is Disclosure.SUM:
        # Whose sum it is depends on who is asked beside whom.
        check_participation(
            fitted,
            key_ids=asked.roster.key_ids,
            least=protection.least_sites(asked.n_sites),
        )
    remember(fitted)

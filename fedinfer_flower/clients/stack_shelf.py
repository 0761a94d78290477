"""The stacks that a site has checked and kept; it answers with no others.

A site with a home folder keeps them there, one without in Flower's context, for the run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final, cast

from flwr.app import ConfigRecord, Context

from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.ensemble.fitted import UNTRAINED, FittedAggregator, remember, require_digest
from fedinfer_flower.ensemble.stack_rule import StackRule
from fedinfer_flower.errors import CapacityError, InvalidValueError, LabelSpaceError
from fedinfer_flower.wire.messages import Question

__all__ = ["MAX_STACKS", "bring_stack", "keep_stack", "kept_stack"]

MAX_STACKS: Final = 64
"""Kept at a site; further ones are refused."""

_RECORD: Final = "fedinfer-stacks"
_FOLDER: Final = "stacks"


def keep_stack(fitted: FittedAggregator, context: Context, folder: Path | None) -> None:
    """Keep an aggregator that the site has checked.

    Raises
    ------
    CapacityError
        If the site keeps `MAX_STACKS` already.
    """
    if folder is None:
        record = cast(ConfigRecord, context.state.setdefault(_RECORD, ConfigRecord()))
        _require_room(len(record), known=fitted.digest in record)
        record[fitted.digest] = fitted.to_bytes()
        return
    shelf = folder / _FOLDER
    shelf.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = shelf / fitted.digest
    _require_room(len(list(shelf.iterdir())), known=path.exists())
    draft = path.with_suffix(".new")
    draft.write_bytes(fitted.to_bytes())
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
    remember(fitted)


def _require_room(n_kept: int, *, known: bool) -> None:
    if n_kept >= MAX_STACKS and not known:
        raise CapacityError(f"this site keeps {n_kept} stacks and takes no more")

"""What `InferenceMod` may be given: wrong combinations fail when it is built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from flwr.app import Context

from fedinfer_flower.clients.consent import FURTHER_WORK
from fedinfer_flower.errors import ConfigError, InvalidValueError
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.query import CountsKind

if TYPE_CHECKING:
    from fedinfer_flower.clients.encrypted_answering import EncryptedPolicy

__all__ = ["LoadModel", "check_options", "require_alone"]

LoadModel = Callable[[Context], object]

_ENCRYPTED_QUERY: Final = "encrypted-query"


def check_options(
    *,
    load_model: object,
    share_counts: str,
    collections: Mapping[str, Collection[str] | None],
    budget: BudgetPolicy | None,
    encrypted: EncryptedPolicy | None,
    max_models: int,
) -> None:
    """Refuse options that do not go together.

    Raises
    ------
    InvalidValueError
        For an option out of its range.
    ConfigError
        If encrypted queries are set up without consent to them, or a budget beside work
        that it cannot count.
    """
    if not callable(load_model):
        raise InvalidValueError("load_model is a function from Context to a model")
    if share_counts not in CountsKind.__members__.values():
        raise InvalidValueError(
            f"share_counts is 'presence', 'counts' or 'withheld', not {share_counts!r}"
        )
    for option, given in collections.items():
        if isinstance(given, str):
            raise InvalidValueError(f"{option} is a collection", hint="write ('he',), not 'he'")
    if max_models < 1:
        raise InvalidValueError("max_models is at least 1")
    further = frozenset(collections["agrees_to"] or ())
    unknown = sorted(further - FURTHER_WORK)
    if unknown:
        raise InvalidValueError(
            f"agrees_to names {unknown[0]!r}", hint=f"known: {', '.join(sorted(FURTHER_WORK))}"
        )
    if further and budget is not None:
        raise ConfigError(
            f"a site with a privacy budget does not take part in {', '.join(sorted(further))}:"
            " what leaves it there has no noise that the budget could count",
            hint="drop the budget, or leave agrees_to empty",
        )
    agreed = _ENCRYPTED_QUERY in (collections["protections"] or ())
    if encrypted is not None and not agreed:
        raise ConfigError(
            "terms for encrypted queries, which the site has not agreed to answer",
            hint=f"name {_ENCRYPTED_QUERY!r} in protections, with all others that it answers",
        )
    if agreed and budget is not None:
        raise ConfigError(
            "a site with a privacy budget does not answer encrypted queries: no answer to"
            " them has noise that the budget could count",
            hint="drop the budget, or answer under dp, secagg+dp or he+dp only",
        )


def require_alone(options: Iterable[object]) -> None:
    """Require that nothing is said in code of which the site policy says everything.

    Raises
    ------
    ConfigError
        If one of the options is given.
    """
    if any(given not in (None, False, ()) for given in options):
        raise ConfigError(
            "a site policy, and options beside it that it covers",
            hint="say it in the policy: its digest is in the audit log, options are not",
        )

"""What a `FedRefine` was told: checked when it is built, names resolved when it starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Final

from fedinfer_flower.errors import ConfigError, InvalidValueError, UnknownNameError
from fedinfer_flower.wire.refine_fields import MAX_QUESTIONS, MAX_ROUNDS, decoding_options

__all__ = [
    "CONSENTS",
    "MEDIA",
    "RefineOptions",
    "consents",
    "names_of",
    "plain_decoding",
    "require_names",
]

MEDIA: Final = ("auto", "cache", "text", "own")
CONSENTS: Final = ("text", "cache", "full-cache")

_WHY_CONSENT: Final = (
    "a KV cache can be inverted: whoever holds one recovers what the prompt said, and of a full"
    " cache every token"
)


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """The settings of an exchange.

    Parameters
    ----------
    receivers : tuple of str, optional
        Names; None for all sites.
    sharers : tuple of str, optional
        Names; None for all sites.
    medium : {"auto", "cache", "text", "own"}
    allow : frozenset of str
        The querier's consent: ``"text"``, ``"cache"``, ``"full-cache"``.
    hosted : bool
        Whether the coordinator holds the fusers.
    rephrase : str
        Name of a rephraser at the receiver; ``"none"`` for the question as it is.
    rounds : int
    decoding : mapping
        Fields of `fedinfer_flower.language.decoding.Decoding`.
    batch_size : int

    Raises
    ------
    ConfigError
        For a combination that cannot work.
    """

    receivers: tuple[str, ...] | None = None
    sharers: tuple[str, ...] | None = None
    medium: str = "auto"
    allow: frozenset[str] = frozenset({"text"})
    hosted: bool = False
    rephrase: str = "template"
    rounds: int = 1
    decoding: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32

    def __post_init__(self) -> None:
        self._check_values()
        self._check_parties()
        self._check_consent()
        if self.medium == "own" and self.rounds > 1:
            raise ConfigError(
                "several rounds of own answers: nothing comes in that could change them",
                hint="rounds=1, or let sharers help: medium='auto'",
            )
        if self.hosted and self.medium in ("text", "own"):
            raise ConfigError(
                f"fusers at the coordinator, and medium={self.medium!r} that sends no cache",
                hint="drop fusers, or medium='auto' with allow=('text', 'cache')",
            )
        if self.hosted and not self.caches_allowed:
            raise ConfigError(
                f"fusers at the coordinator without consent to caches: {_WHY_CONSENT},"
                " here the coordinator too",
                hint="name it: allow=('text', 'cache')",
            )

    @property
    def caches_allowed(self) -> bool:
        """Whether the querier consents to any cache."""
        return bool(self.allow & {"cache", "full-cache"})

    def _check_values(self) -> None:
        if self.medium not in MEDIA:
            raise InvalidValueError(
                f"medium is one of {', '.join(MEDIA)}, not {self.medium!r}"
                f"{_did_you_mean(str(self.medium), MEDIA)}"
            )
        for name in sorted(self.allow - set(CONSENTS)):
            raise InvalidValueError(
                f"allow names {name!r}; known are {', '.join(CONSENTS)}"
                f"{_did_you_mean(name, CONSENTS)}"
            )
        if type(self.rounds) is not int or not 1 <= self.rounds <= MAX_ROUNDS:
            raise InvalidValueError(f"rounds is in [1, {MAX_ROUNDS}], got {self.rounds!r}")
        if type(self.batch_size) is not int or not 1 <= self.batch_size <= MAX_QUESTIONS:
            raise InvalidValueError(f"batch_size is in [1, {MAX_QUESTIONS}]")
        if not isinstance(self.rephrase, str):
            raise InvalidValueError("rephrase is the name of a rephraser; 'none' for none")

    def _check_parties(self) -> None:
        if self.receivers is not None and not self.receivers:
            raise InvalidValueError("no receiver: nobody would answer", hint="receiver='all'")
        if self.sharers is not None and not self.sharers and self.medium != "own":
            raise ConfigError("no sharer is named", hint="receivers alone are medium='own'")
        if (
            self.receivers is not None
            and len(self.receivers) == 1
            and self.sharers == self.receivers
        ):
            raise ConfigError(
                f"{self.receivers[0]!r} is the only receiver and the only sharer",
                hint="name another sharer, or ask it alone: medium='own'",
            )

    def _check_consent(self) -> None:
        if self.medium == "cache" and not self.caches_allowed:
            raise ConfigError(
                f"medium='cache' without the querier's consent: {_WHY_CONSENT}",
                hint="name it: allow=('cache',), or allow=('text', 'cache') to fall back on text",
            )
        if self.medium == "text" and "text" not in self.allow:
            raise ConfigError(
                "medium='text', which the querier does not consent to",
                hint="name it: allow=('text',)",
            )
        if self.medium == "auto" and not self.allow:
            raise ConfigError(
                "medium='auto', and consent to no medium", hint="medium='own', or allow=('text',)"
            )


def names_of(given: str | Iterable[str] | None, option: str) -> tuple[str, ...] | None:
    """Return names as a tuple, and None for all.

    Raises
    ------
    InvalidValueError
        If one comes twice, or is no text.

    Examples
    --------
    >>> names_of("north", "receiver"), names_of("all", "receiver"), names_of(None, "sharers")
    (('north',), None, None)
    """
    if given is None or given == "all":
        return None
    if not isinstance(given, Iterable):
        raise InvalidValueError(f"{option} is a name, a list of names, or 'all'")
    names = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(name, str) and name for name in names):
        raise InvalidValueError(f"{option} is a name, a list of names, or 'all'")
    if len(set(names)) != len(names):
        raise InvalidValueError(f"{option} names a site twice")
    return names


def require_names(wanted: Sequence[str], known: Sequence[str], failed: str = "") -> None:
    """Require that all sites that are named are there; `failed` says who else was asked.

    Raises
    ------
    UnknownNameError
        With the nearest known name.
    """
    for name in wanted:
        if name not in known:
            raise UnknownNameError(
                f"no site is called {name[:64]!r}{_did_you_mean(name, known)}",
                hint=f"introduced themselves: {', '.join(sorted(known)) or 'none'}{failed}",
            )


def consents(allow: str | Iterable[str]) -> frozenset[str]:
    """Return the media that a querier consents to; who allows full caches allows any."""
    if not isinstance(allow, Iterable):
        raise InvalidValueError(f"allow is a list, of {', '.join(CONSENTS)}")
    names = [allow] if isinstance(allow, str) else list(allow)
    if not all(isinstance(name, str) for name in names):
        raise InvalidValueError(f"allow is a list, of {', '.join(CONSENTS)}")
    given = frozenset(names)
    return given | {"cache"} if "full-cache" in given else given


def plain_decoding(given: Any) -> dict[str, Any]:
    """Return what was said of decoding as JSON scalars, from a mapping or a `Decoding`.

    Where an answer stops is the prompt format's to say, at the site: it does not travel.
    """
    if given is None:
        return {}
    fields = asdict(given) if is_dataclass(given) and not isinstance(given, type) else given
    return {name: value for name, value in decoding_options(fields).items() if name != "stop"}


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""

"""Which medium each sharer is asked for: as told, or as the planner finds best."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Final

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.kv.planner import (
    Medium,
    Plan,
    Planner,
    PlannerOptions,
    SharingPolicy,
    Speed,
    Workload,
)
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.strategies.refine_onboarding import LanguageSite
from fedinfer_flower.strategies.refine_options import RefineOptions
from fedinfer_flower.strategies.refine_result import PlannedMedium

__all__ = ["MediaPlanner", "Terms", "share_of"]

_CODEC: Final = "int8"
_CHARS_PER_TOKEN: Final = 4
_UNKNOWN_CHARS: Final = 256
_NOTE_TOKENS: Final = 32
_MAX_SIZE: Final = 65_536
_SHORTEST_S: Final = 1e-4


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is planned for: one batch at one receiver.

    Parameters
    ----------
    rows : int
        Questions.
    characters : int
        Of the longest question; 0 where they are sealed.
    deadline_s : float
        Until the answers.
    """

    rows: int
    characters: int
    deadline_s: float

    @property
    def prompt_tokens(self) -> int:
        """Tokens of one prompt: a guess, made without a tokenizer."""
        return max(1, (self.characters or _UNKNOWN_CHARS) // _CHARS_PER_TOKEN)


def share_of(receiver: LanguageSite, sharer: LanguageSite) -> ShareSpec | None:
    """Return what a sharer sends to the fuser that the receiver has for it; None without one."""
    for note in receiver.card.fusers:
        if note.sharer_digest == sharer.card.model_digest:
            try:
                return ShareSpec.from_dict(note.share)
            except FedInferError:
                return None
    return None


class MediaPlanner:
    """Choose media, and learn from transfers how fast the links are.

    Parameters
    ----------
    options : RefineOptions
    planning : PlannerOptions, optional

    Privacy
    -------
    Sizes and seconds of every pair stay at the coordinator. It sees them anyway.
    """

    def __init__(self, options: RefineOptions, planning: PlannerOptions | None = None) -> None:
        self._options, self._planning = options, planning
        # One a receiver: what was chosen last, and the way from a sharer, belong to a pair.
        self._planners: dict[str, Planner] = {}

    def choose(
        self,
        receiver: LanguageSite,
        sharer: LanguageSite,
        *,
        terms: Terms,
        share: ShareSpec | None,
        allow: frozenset[str],
    ) -> PlannedMedium:
        """Return how a sharer is to help a receiver.

        Parameters
        ----------
        receiver, sharer : LanguageSite
        terms : Terms
        share : ShareSpec, optional
            What a cache would consist of; None where no fuser reads it.
        allow : frozenset of str
            Of the querier.
        """
        media = self._media(receiver, sharer, terms, share)
        chosen: dict[str, Any] = {"receiver": receiver.name, "sharer": sharer.name}
        if self._options.medium == "auto":
            plan = self._planner(receiver).choose(
                sharer.name,
                media,
                workload=Workload(
                    sharer_prompt_tokens=terms.rows * terms.prompt_tokens,
                    receiver_prompt_tokens=terms.rows * terms.prompt_tokens,
                    answer_tokens=int(self._options.decoding.get("max_new_tokens", 32)),
                ),
                policies=_policies(sharer, allow),
                deadline_s=terms.deadline_s,
                sharer=_speed(sharer),
                receiver=_speed(receiver),
            )
            return PlannedMedium(
                medium=_wire_name(plan.medium.kind),
                reason=plan.reason,
                predicted_s=plan.predicted_s,
                table=_table(plan),
                **chosen,
            )
        medium, reason = self._as_told(media, sharer, allow)
        return PlannedMedium(medium=medium, reason=reason, **chosen)

    def observe(
        self,
        receiver: LanguageSite,
        sharer: LanguageSite,
        medium: str,
        *,
        size_bytes: int,
        seconds: float,
    ) -> None:
        """Add one transfer, less the time that the sharer says its model takes."""
        speed, compute_s = _speed(sharer), 0.0
        if speed is not None:
            written = _NOTE_TOKENS if medium == "text" else 1
            prompt = _UNKNOWN_CHARS // _CHARS_PER_TOKEN
            compute_s = speed.read_s(prompt) + speed.write_s(written)
        self._planner(receiver).observe_transfer(
            sharer.name,
            size_bytes=max(size_bytes, 1),
            seconds=max(seconds - compute_s, _SHORTEST_S),
        )

    # -- parts -------------------------------------------------------------------------

    def _planner(self, receiver: LanguageSite) -> Planner:
        return self._planners.setdefault(receiver.key_id, Planner(options=self._planning))

    def _media(
        self,
        receiver: LanguageSite,
        sharer: LanguageSite,
        terms: Terms,
        share: ShareSpec | None,
    ) -> list[Medium]:
        media = [Medium.text(tokens=_NOTE_TOKENS)]
        if share is not None:
            tokens = share.tokens(terms.prompt_tokens)
            floats = tokens * _floats_per_token(sharer, hidden=share.hidden)
            relayed = tokens * _floats_per_token(receiver, hidden=False)
            media.append(
                Medium.cache(
                    share,
                    floats=floats,
                    codec=_CODEC,
                    relayed_floats=relayed if self._options.hosted else 0,
                )
            )
        return [
            replace(m, up_bytes=terms.rows * m.up_bytes, down_bytes=terms.rows * m.down_bytes)
            for m in media
        ]

    def _as_told(
        self, media: list[Medium], sharer: LanguageSite, allow: frozenset[str]
    ) -> tuple[str, str]:
        """Return the medium that was asked for, or the next best that everybody allows."""
        wanted = self._options.medium
        if wanted == "own":
            return "own", "medium='own': no sharer is asked"
        order = ("cache", "text") if wanted == "cache" else ("text",)
        policies = _policies(sharer, allow)
        reasons = []
        for name in order:
            found = [m for m in media if _wire_name(m.kind) == name]
            if not found:
                reasons.append("the receiver has no fuser for this sharer's model")
                continue
            why_not = [
                f"the {who} {why}" for who, p in policies.items() if (why := p.why_not(found[0]))
            ]
            if not why_not:
                asked = f"medium={wanted!r} was asked for"
                return name, "; ".join([asked, *reasons])
            reasons += why_not
        return "own", f"medium={wanted!r} cannot be: {'; '.join(reasons)}"


def _policies(sharer: LanguageSite, allow: frozenset[str]) -> dict[str, SharingPolicy]:
    return {
        "sharer": SharingPolicy(media=sharer.card.media, discloses="text"),
        "receiver": SharingPolicy.everything(),
        "querier": SharingPolicy(media=allow, discloses="text"),
    }


def _speed(site: LanguageSite) -> Speed | None:
    speeds = site.card.speeds
    if speeds is None:
        return None
    return Speed(
        prefill_s=speeds.prefill_s,
        prefill_s_per_token=speeds.prefill_s_per_token,
        decode_s_per_token=speeds.decode_s,
    )


def _floats_per_token(site: LanguageSite, *, hidden: bool) -> int:
    # The layout's own class needs torch, which a coordinator can do without.
    layout = json.loads(site.card.layout)
    layers, heads, size, width = (
        value if type(value := layout.get(name)) is int and 1 <= value <= _MAX_SIZE else 1
        for name in ("layers", "heads", "head_size", "hidden_size")
    )
    return 2 * layers * heads * size + (width if hidden else 0)


def _wire_name(kind: str) -> str:
    return "cache" if kind == "full-cache" else kind


def _table(plan: Plan) -> tuple[str, ...]:
    return tuple(
        f"{row.medium.name}: quality {row.quality:.2f} in {row.predicted_s:.2f} s,"
        f" {row.medium.up_bytes} bytes{f' ({row.why_not})' if row.why_not else ''}"
        for row in plan.table
    )

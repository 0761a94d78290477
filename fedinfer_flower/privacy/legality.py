"""Which rule works under which protection, and what to do instead where it does not.

A rule declares what its coordinator must be shown, a protection what it reveals; the one
must not be more than the other. A protection may have further reasons (`check_rule`).
"""

from __future__ import annotations

from fedinfer_flower.ensemble.base import RULES, Disclosure, EnsembleRule
from fedinfer_flower.errors import IncompatibleProtection
from fedinfer_flower.privacy.base import PROTECTIONS, Protection

__all__ = ["legality_matrix", "refusal", "require_legal"]

_PLAINEST = {"mean-probability": 0, "majority-vote": 1}

_SHOWN = {
    Disclosure.SUM: "reveals only their sum",
    Disclosure.SCORES: "reveals each site's scores",
}


def refusal(rule: EnsembleRule, protection: Protection) -> str:
    """Return why the rule cannot work under the protection; empty if it can.

    Examples
    --------
    >>> from fedinfer_flower.privacy.he import HomomorphicEncryption
    >>> refusal(RULES.get("mean-probability")(), HomomorphicEncryption())
    ''
    """
    if rule.discloses > protection.reveals:
        return (
            f"rule {rule.name!r} needs each site's own scores, but protection"
            f" {protection.name!r} {_SHOWN[protection.reveals]}"
        )
    reason = protection.check_rule(rule)
    return f"protection {protection.name!r} refuses: {reason}" if reason else ""


def require_legal(rule: EnsembleRule, protection: Protection) -> None:
    """Refuse a pair that cannot work, with the reason and the nearest pairs that can.

    Called when a strategy is built, and again at each site: a coordinator cannot talk a
    site into a pair that its protection was not made for.

    Raises
    ------
    IncompatibleProtection
        With another rule for this protection and another protection for this rule.

    Examples
    --------
    >>> from fedinfer_flower.privacy.he import HomomorphicEncryption
    >>> require_legal(RULES.get("mean-probability")(), HomomorphicEncryption())
    """
    reason = refusal(rule, protection)
    if reason:
        raise IncompatibleProtection(reason, hint=_nearest(rule, protection))


def legality_matrix() -> dict[str, dict[str, str]]:
    """Return, by rule and protection of default options, the reason for a refusal or "".

    Examples
    --------
    >>> matrix = legality_matrix()
    >>> matrix["mean-probability"]["he"]
    ''
    """
    rules = [RULES.get(name)() for name in RULES.names()]
    protections = [PROTECTIONS.get(name)() for name in PROTECTIONS.names()]
    return {rule.name: {p.name: refusal(rule, p) for p in protections} for rule in rules}


def _nearest(rule: EnsembleRule, protection: Protection) -> str:
    ways = []
    other_rule = _nearest_rule(rule, protection)
    if other_rule:
        ways.append(f"rule {other_rule!r} with {protection.name!r}")
    other_protection = _nearest_protection(rule, protection)
    if other_protection:
        ways.append(f"protection {other_protection} with {rule.name!r}")
    return f"use {', or '.join(ways)}" if ways else "no registered rule or protection fits"


def _nearest_rule(rule: EnsembleRule, protection: Protection) -> str:
    """Return the legal rule that is most like this one, the plainest first."""
    legal = [r for r in (RULES.get(n)() for n in RULES.names()) if not refusal(r, protection)]

    def distance(other: EnsembleRule) -> tuple[bool, bool, int, str]:
        return (
            other.score_kind is not rule.score_kind,
            not other.needs <= rule.needs,  # asks for evidence that is perhaps not there
            _PLAINEST.get(other.name, len(_PLAINEST)),
            other.name,
        )

    return min(legal, key=distance).name if legal else ""


def _nearest_protection(rule: EnsembleRule, protection: Protection) -> str:
    """Return the legal protection that reveals least; the same one with other options first."""
    legal = [p for p in (PROTECTIONS.get(n)() for n in PROTECTIONS.names()) if not refusal(rule, p)]

    def distance(other: Protection) -> tuple[bool, bool, bool, str]:
        return (
            other.name != protection.name,
            other.name == "plain",  # no protection at all comes last
            other.reveals > Disclosure.SUM,
            other.name,
        )

    if not legal:
        return ""
    best = min(legal, key=distance)
    if best.name != protection.name:
        return repr(best.name)
    ours = protection.options()
    changed = [f"{key}={value!r}" for key, value in best.options().items() if ours[key] != value]
    return f"{best.name!r} with {', '.join(changed)}"

"""A plan as a tree of text, for terminals and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fedinfer_flower.selection.plan import QueryPlan

__all__ = ["plan_lines"]

_MAX_ROWS: Final = 12
"""Lines for a list of sites; a plan of a thousand sites is still read."""


def plan_lines(plan: QueryPlan) -> list[str]:
    """Return the lines of a plan's summary."""
    n_candidates = len(plan.sites) + len(plan.refused) + len(plan.passed_over)
    parts: list[tuple[str, list[str]]] = [
        (
            f"question: {_number(plan.n_queries, 'row')}, rule {plan.rule},"
            f" protection {plan.protection}",
            [],
        ),
        (f"sites: {len(plan.sites)} of {n_candidates}, by {plan.selector!r}", _sites(plan)),
    ]
    if plan.refused:
        parts.append((f"refused: {len(plan.refused)}", _cut(_refused(plan))))
    if plan.passed_over:
        parts.append((f"not chosen: {', '.join(_cut(_passed_over(plan)))}", []))
    accuracy, basis = plan.accuracy
    expected = basis if accuracy is None else f"about {100 * accuracy:.0f} % ({basis})"
    parts += [
        (f"expected accuracy: {expected}", []),
        (f"price: {_price(plan)}", []),
        (
            f"payload: {plan.total_bytes} bytes ({plan.request_bytes} to and"
            f" {plan.reply_bytes} from each site)",
            [],
        ),
        (f"epsilon: {_epsilon(plan)}", []),
    ]
    lines = ["QueryPlan"]
    for number, (head, rows) in enumerate(parts):
        last = number == len(parts) - 1
        lines.append(f"{'└' if last else '├'}── {head}")
        for place, row in enumerate(rows):
            stem = " " if last else "│"
            lines.append(f"{stem}   {'└' if place == len(rows) - 1 else '├'}── {row}")
    return lines


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _sites(plan: QueryPlan) -> list[str]:
    several = len(plan.groups) > 1
    return _cut(
        [
            f"{f'group {site.group + 1}: ' if several else ''}{site.name}: {site.reason}"
            f" ({site.price:.6g} credits)"
            for site in plan.sites
        ]
    )


def _refused(plan: QueryPlan) -> list[str]:
    return [f"{plan.names[site]}: {reason}" for site, reason in plan.refused.items()]


def _passed_over(plan: QueryPlan) -> list[str]:
    return [plan.names[site] for site in plan.passed_over]


def _cut(rows: list[str]) -> list[str]:
    if len(rows) <= _MAX_ROWS:
        return rows
    return [*rows[:_MAX_ROWS], f"and {len(rows) - _MAX_ROWS} more"]


def _price(plan: QueryPlan) -> str:
    if len(plan.groups) == 1:
        return f"{plan.price:.6g} credits"
    first = plan.price_per_group[0]
    return f"{first:.6g} to {plan.price:.6g} credits, by how many groups are asked"


def _epsilon(plan: QueryPlan) -> str:
    if plan.epsilon_per_site is None:
        return "none: no noise"
    return f"{plan.epsilon_per_site:.4g} at each site (basic composition)"

"""The figure of the rewards section: who gets which share, by each way to split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedinfer_flower.reporting.axes import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    legend_below,
    new_figure,
    rows_on_y,
)
from fedinfer_flower.reporting.formats import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MAX_PAID_SITES", "rewards_plot"]

MAX_PAID_SITES = 40

_MARKS = (
    ("paid", BLUE, "P"),
    ("shapley", BLACK, "D"),
    ("equal", GREY, "|"),
    ("final-agreement", ORANGE, "o"),
    ("entropy", PURPLE, "v"),
)


def rewards_plot(results: Mapping[str, Any]) -> Figure:
    """Draw each site's share of the reward, free riders in another colour."""
    rewards = results["rewards"]
    sites = rewards["sites"][:MAX_PAID_SITES]
    labels = {split["key"]: split["label"] for split in rewards["splits"]}
    figure, (axis,) = new_figure(1.5 + 0.34 * len(sites))
    for y, site in enumerate(sites):
        values = [number(site["shares"].get(key)) for key, _, _ in _MARKS]
        known = [value for value in values if value == value]
        colour = VERMILLION if site["is_free_rider"] else "#cccccc"
        if known:
            axis.hlines(y, min(known), max(known), color=colour, linewidth=3, zorder=1)
    for key, colour, marker in _MARKS:
        if key in labels:
            axis.plot(
                [number(site["shares"].get(key)) for site in sites],
                range(len(sites)),
                marker,
                color=colour,
                markersize=8 if marker == "|" else 6,
                label=labels[key],
            )
    rows_on_y(
        axis,
        [f"{s['name']} (free rider)" if s["is_free_rider"] else s["name"] for s in sites],
    )
    axis.set_xlim(left=-0.01)
    axis.set_xlabel("share of the reward")
    legend_below(figure, axis, 1)
    return figure

"""Figures as SVG text that can stand inside a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedinfer_flower.reporting.extra import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["render_svg"]

_SETTINGS = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Names may hold dollar signs; they are text, not formulas.
    "text.parse_math": False,
    "text.usetex": False,
}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_TAG = re.compile(r"<[^<>]*>")
_REFERENCE = re.compile(r"""( id="|url\(#|href="#)""")


def _inline(document: str, name: str) -> str:
    """Drop the XML prologue and make the ids of the figure its own within the page."""
    body = document[document.index("<svg") :]
    # Text content is escaped, so whatever stands between < and > is a tag of matplotlib's.
    return _TAG.sub(lambda tag: _REFERENCE.sub(rf"\g<1>{name}-", tag.group()), body)


def render_svg(plot: Callable[[Mapping[str, Any]], Figure], results: Mapping[str, Any]) -> str:
    """Draw a figure and return it as an SVG element.

    Parameters
    ----------
    plot : callable
        Takes the results, returns a matplotlib Figure.
    results : mapping
        Cleaned results.

    Returns
    -------
    svg : str
        One `<svg>` element without prologue, metadata or address; text in it is escaped.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    name = plot.__name__.replace("_", "-")
    matplotlib = import_extra("matplotlib")
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}), warnings.catch_warnings():
        # The browser has fonts for scripts that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        plot(results).savefig(buffer, format="svg", metadata=_METADATA)
    return _inline(buffer.getvalue(), name)

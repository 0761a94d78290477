"""Shorter pauses between looks for an object that is still being uploaded."""

from __future__ import annotations

from flwr.supercore.inflatable import inflatable_utils

__all__ = ["shorten"]


def shorten(*, initial_s: float, cap_s: float) -> None:
    """Change the defaults of Flower's two pulling functions in this process."""
    for function in (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    ):
        # Defaults are bound when a function is defined: changing the constants has no effect.
        # No limit on tries, because short pauses would use them up before `max_time`.
        defaults = function.__kwdefaults__ or {}
        defaults.update(initial_backoff=initial_s, backoff_cap=cap_s, max_tries_per_object=None)

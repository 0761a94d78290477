"""Which querier keys have their secret half in this very process.

If coordinator and querier are one process, single-key encryption protects nothing from
the coordinator. Nobody should have to notice that by reading code: the querier notes its
keys here, and the coordinator looks.
"""

from __future__ import annotations

__all__ = ["note_secret", "secret_in_process"]

_held: set[str] = set()


def note_secret(key_id: str) -> None:
    """Note that this process holds the secret key with this fingerprint."""
    if key_id:
        _held.add(key_id)


def secret_in_process(key_id: str) -> bool:
    """Return whether this process has ever held that secret key.

    Examples
    --------
    >>> secret_in_process("")
    False
    """
    return key_id in _held

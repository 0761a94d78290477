"""How worker and warm SuperNode show each other that they have the same key, without sending it.

They meet on a loopback port, which any user of the machine may take while the SuperNode is
down: whoever listens there must learn nothing that helps it at another port or later, and must
not be believed. So the worker answers the SuperNode's challenge, the SuperNode the worker's
nonce, and both say at which port.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final

__all__ = [
    "CHALLENGE_HEADER",
    "NONCE_HEADER",
    "PROOF_HEADER",
    "fresh",
    "is_proof",
    "node_proof",
    "worker_proof",
]

CHALLENGE_HEADER: Final = "fedinfer-challenge"
"""Of the SuperNode, new with each of its processes."""
NONCE_HEADER: Final = "fedinfer-nonce"
"""Of the worker, new with each request."""
PROOF_HEADER: Final = "fedinfer-node-proof"

_MAX_CHARS: Final = 64


def fresh() -> str:
    """Return a challenge or nonce that was never used before."""
    return secrets.token_hex(16)


def worker_proof(key: str, *, port: int, challenge: str) -> str:
    """Return what shows a SuperNode at a port that a worker has the key."""
    return _proof(key, "worker", port, challenge)


def node_proof(key: str, *, port: int, nonce: str) -> str:
    """Return what shows a worker that the SuperNode at a port has the key."""
    return _proof(key, "supernode", port, nonce)


def is_proof(found: str, expected: str) -> bool:
    """Compare two proofs in constant time."""
    return hmac.compare_digest(found.encode(), expected.encode())


def _proof(key: str, who: str, port: int, word: str) -> str:
    text = f"fedinfer v1|{who}|{port}|{word[:_MAX_CHARS]}"
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()

"""A worker's requests to its warm SuperNode: both show that they have the same key."""

from __future__ import annotations

import secrets
from typing import Final

import httpx

from fedinfer_flower.errors import DeploymentError, UnavailableError
from fedinfer_flower.flower_internals.node_key import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    fresh,
    is_proof,
    node_proof,
    worker_proof,
)
from fedinfer_flower.flower_internals.task_frames import KEY_HEADER, WORKER_HEADER

__all__ = ["NodeClient"]

_REQUEST_S: Final = 30.0


class NodeClient:
    """Requests to the warm routes of a SuperNode on this machine.

    Parameters
    ----------
    address : str
        ``HOST:PORT``.
    key : str
        Empty for none: then anything that listens there is believed.
    """

    def __init__(self, address: str, *, key: str) -> None:
        self._key, self._challenge = key, ""
        self._port = int(address.rpartition(":")[2])
        # No proxy of the environment may come between two processes of one machine.
        self._http = httpx.Client(
            base_url=f"http://{address}",
            headers={WORKER_HEADER: secrets.token_hex(8)},
            timeout=_REQUEST_S,
            trust_env=False,
        )

    @property
    def has_key(self) -> bool:
        """Whether the SuperNode has to show that it has the key."""
        return bool(self._key)

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def post(
        self,
        path: str,
        *,
        headers: dict[str, str],
        content: bytes = b"",
        timeout_s: float = _REQUEST_S,
    ) -> httpx.Response:
        """Send a request, and make sure that who answers has the key.

        Raises
        ------
        DeploymentError
            If the SuperNode asks for another key.
        UnavailableError
            If it does not show that it has this one.
        httpx.HTTPError
            If it cannot be reached.
        """
        nonce = fresh()
        for is_last in (False, True):
            shown = {NONCE_HEADER: nonce}
            if self._key and self._challenge:
                shown[KEY_HEADER] = worker_proof(
                    self._key, port=self._port, challenge=self._challenge
                )
            response = self._http.post(
                path, content=content, headers=headers | shown, timeout=timeout_s
            )
            challenge = response.headers.get(CHALLENGE_HEADER, "")
            if response.status_code != 403:
                break
            if is_last or not self._key:
                raise DeploymentError(
                    "the SuperNode asks for another key than this worker's",
                    hint="give both the same --worker-key file",
                )
            # A SuperNode that was started again has another challenge.
            self._challenge = challenge
        if self._key:
            expected = node_proof(self._key, port=self._port, nonce=nonce)
            if not is_proof(response.headers.get(PROOF_HEADER, ""), expected):
                raise UnavailableError(
                    "what answers at the SuperNode's port does not have this site's worker key",
                    hint="another process may have taken the port; or the SuperNode is stock, or"
                    " was started without --worker-key",
                )
        return response

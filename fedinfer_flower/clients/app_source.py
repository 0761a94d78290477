"""Which ClientApp answers a task: the site's own, or that of a listed app bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Protocol

from flwr.clientapp import ClientApp

from fedinfer_flower.errors import InvalidValueError, PolicyRefusedError

__all__ = ["AppSource", "Bundle", "ListedFabs", "OwnApp"]

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The Flower app bundle (FAB) of a run, as the SuperLink delivers it.

    Parameters
    ----------
    fab_id, fab_version : str
    fab_hash : str
        SHA-256 of its bytes, in hex.
    content : bytes
        Empty where the source does not want it.
    """

    fab_id: str
    fab_version: str
    fab_hash: str
    content: bytes = field(default=b"", repr=False)


class AppSource(Protocol):
    """Says which app answers a task."""

    wants_bundle: bool
    """Whether the bytes of a bundle are needed; if not, they never reach the worker."""

    @property
    def pinned(self) -> str:
        """SHA-256 of the only bundle that this process can still serve; empty for any."""

    def lists(self, fab_hash: str) -> bool:
        """Return whether the source serves runs of this bundle at all."""

    def get(self, run_id: int, bundle: Bundle) -> ClientApp:
        """Return the app that answers.

        Raises
        ------
        PolicyRefusedError
            If the site serves no run of this bundle.
        """


class OwnApp:
    """The site's own app answers every run; code of a bundle is never installed or imported.

    Parameters
    ----------
    app : ClientApp

    Privacy
    -------
    Whoever starts runs on the SuperLink chooses the bundle. It has no effect here: it reaches
    neither the disk nor the interpreter of the worker.

    Examples
    --------
    >>> app = ClientApp()
    >>> OwnApp(app).get(7, Bundle(fab_id="a/b", fab_version="1", fab_hash="00")) is app
    True
    """

    wants_bundle = False

    def __init__(self, app: ClientApp) -> None:
        self._app = app

    @property
    def pinned(self) -> str:
        """Any bundle will do."""
        return ""

    def lists(self, fab_hash: str) -> bool:  # noqa: ARG002
        """Return True: the bundle does not matter."""
        return True

    def get(self, run_id: int, bundle: Bundle) -> ClientApp:  # noqa: ARG002
        """Return the site's own app."""
        return self._app


class ListedFabs:
    """The app of a bundle answers, if the site's owner has listed the bundle's SHA-256.

    One bundle a process: Python keeps what it imported, so a second bundle with a package of
    the same name would run the first one's code. The worker ends instead and is started anew.

    Parameters
    ----------
    hashes : collection of str
        SHA-256 of the bundles that may run, in hex.
    load : callable, optional
        From `Bundle` to its app; runs the bundle's code.

    Raises
    ------
    InvalidValueError
        If a hash is none.

    Privacy
    -------
    A listed bundle's code runs with all rights of the worker: list what you have read. A bundle
    that is not listed is neither installed nor imported.
    """

    wants_bundle = True

    def __init__(
        self, hashes: Collection[str], *, load: Callable[[Bundle], ClientApp] | None = None
    ) -> None:
        for value in hashes:
            if not _SHA256.fullmatch(value):
                raise InvalidValueError("fab_hashes: not a SHA-256 in lower-case hex")
        self._hashes = frozenset(hashes)
        self._load = load or _load_from_bundle
        self._pinned = ""
        self._app: ClientApp | None = None

    @property
    def pinned(self) -> str:
        """The bundle that this process has imported; empty before the first."""
        return self._pinned

    def lists(self, fab_hash: str) -> bool:
        """Return whether the bundle may run at this site."""
        return fab_hash in self._hashes

    def get(self, run_id: int, bundle: Bundle) -> ClientApp:  # noqa: ARG002
        """Return the bundle's app, loaded the first time.

        Raises
        ------
        PolicyRefusedError
            If the bundle is not listed, or this process has imported another one.
        """
        if not self.lists(bundle.fab_hash):
            raise PolicyRefusedError(
                "this site does not run the code of this app",
                hint="the site's owner lists its SHA-256 in [code] fab_hashes, or lets the"
                " site's own app answer",
            )
        if self._pinned not in ("", bundle.fab_hash):
            raise PolicyRefusedError(
                "this site's worker serves another app and is started anew", hint="ask again"
            )
        if self._app is None:
            # First, because a load that fails half-way has imported some of it.
            self._pinned = bundle.fab_hash
            self._app = self._load(bundle)
        return self._app


def _load_from_bundle(bundle: Bundle) -> ClientApp:
    from fedinfer_flower.flower_internals.fab_app import app_of_fab

    return app_of_fab(
        bundle.content,
        fab_id=bundle.fab_id,
        fab_version=bundle.fab_version,
        fab_hash=bundle.fab_hash,
    )

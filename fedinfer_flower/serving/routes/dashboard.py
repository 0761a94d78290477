"""The dashboard: one page, its style and its script; the figures come from ``/v1/status``."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI
from starlette.responses import Response

if TYPE_CHECKING:
    from fedinfer_flower.serving.desk import Desk

__all__ = ["CONTENT_POLICY", "add_routes"]

CONTENT_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""A site's name that became markup would still run nothing, and reach nobody."""

_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/dashboard/icon.svg": ("icon.svg", "image/svg+xml"),
}


def add_routes(app: FastAPI, desk: Desk) -> None:  # noqa: ARG001
    """Serve the page and its parts: fixed files of the package, read once.

    Privacy
    -------
    The files hold no data, and need no key. What the page shows comes from ``/v1/status``,
    with the key that the operator types in; the browser keeps it until the tab is closed.
    """
    folder = resources.files("fedinfer_flower.serving").joinpath("dashboard")
    for path, (name, media_type) in _FILES.items():
        _serve(app, path, folder.joinpath(name).read_bytes(), media_type)


def _serve(app: FastAPI, path: str, body: bytes, media_type: str) -> None:
    async def file() -> Response:
        return Response(body, media_type=media_type, headers=_HEADERS)

    app.add_api_route(path, file, methods=["GET"], include_in_schema=False)

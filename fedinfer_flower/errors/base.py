"""The root of the error tree."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["FedInferError"]


class FedInferError(Exception):
    """Root of all errors of the package.

    Parameters
    ----------
    message : str
        What happened and where. Safe to show to any role.
    hint : str
        The next step to take; may be empty.
    site : str
        The site concerned, by name or node id; may be empty.
    """

    code: ClassVar[str] = "FI000"

    def __init__(self, message: str, *, hint: str = "", site: str = "") -> None:
        self.message = message
        self.hint = hint
        self.site = site
        where = f" [site {site}]" if site else ""
        fix = f"\n  fix: {hint}" if hint else ""
        page = f"   docs: docs/reference/errors.md#{self.code.lower()}"
        super().__init__(
            f"{self.code} {type(self).__name__}{where}: {message}{fix}{page if fix else ''}"
        )

    def at_site(self, site: str) -> FedInferError:
        """Return the same error with the name of the site in it."""
        return type(self)(self.message, hint=self.hint, site=site)

"""Import of what only the report needs."""

from __future__ import annotations

import importlib
from typing import Any

from fedinfer_flower.errors import MissingExtraError

__all__ = ["import_extra"]


def import_extra(module: str) -> Any:
    """Import a module of the extra `report`, or say how to install it.

    Parameters
    ----------
    module : str
        Dotted name of the module.

    Returns
    -------
    module : module
        The imported module.

    Raises
    ------
    MissingExtraError
        If the module cannot be imported.

    Examples
    --------
    >>> import_extra("html").escape("<b>")
    '&lt;b&gt;'
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(
            f"the report needs {module.partition('.')[0]}, which is not installed",
            hint="pip install 'fedinfer-flower[report]'",
        ) from None

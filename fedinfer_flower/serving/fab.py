"""The Flower app that carries a gateway: two lines of code, no settings, no secrets."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import DeploymentError

__all__ = ["GATEWAY_APP", "write_project"]

GATEWAY_APP: Final = "fedinfer-gateway"
"""Name of the app; the folder of its project has to have it too."""

_PYPROJECT: Final = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "A gateway of fedinfer-flower: a ServerApp that answers over HTTP."
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["fedinfer-flower=={version}"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedinfer"

[tool.flwr.app.components]
serverapp = "fedinfer_gateway.server_app:app"
clientapp = "fedinfer_gateway.client_app:app"

[tool.flwr.app.config]
gateway-config = ""
"""

_FILES: Final = {
    "__init__.py": '"""A gateway of fedinfer-flower."""\n',
    "server_app.py": (
        '"""The gateway."""\n\n'
        "from fedinfer_flower.serving.gateway_process import noted\n"
        "from fedinfer_flower.serving.server_app import app\n\n"
        "noted(app)\n\n"
        '__all__ = ["app"]\n'
    ),
    "client_app.py": (
        '"""What a site runs whose policy says `[code] app = "fab"`."""\n\n'
        "from fedinfer_flower.clients.site_app import app\n\n"
        '__all__ = ["app"]\n'
    ),
}


def write_project(folder: Path) -> Path:
    """Write the project into a folder; return the path of the project.

    The same release writes the same bytes, and Flower packs them the same way every time:
    sites can list the hash of what `flwr build` makes of it under ``[code] fab-hashes``.

    Raises
    ------
    DeploymentError
        If it cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> project = write_project(Path(tempfile.mkdtemp()))
    >>> sorted(path.name for path in (project / "fedinfer_gateway").iterdir())
    ['__init__.py', 'client_app.py', 'server_app.py']
    """
    project = folder / GATEWAY_APP
    package = project / GATEWAY_APP.replace("-", "_")
    text = _PYPROJECT.format(name=GATEWAY_APP, version=_release())
    try:
        package.mkdir(parents=True, exist_ok=True)
        (project / "pyproject.toml").write_text(text, encoding="utf-8")
        for name, code in _FILES.items():
            (package / name).write_text(code, encoding="utf-8")
    except OSError as exc:
        raise DeploymentError(
            f"the gateway's app cannot be written ({type(exc).__name__})",
            hint="give a folder in which this user may write: TMPDIR",
        ) from None
    return project


def _release() -> str:
    try:
        return version("fedinfer-flower")
    except PackageNotFoundError:
        return "0.0.0"

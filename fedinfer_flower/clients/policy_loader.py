"""The model that a site policy names: loaded, and refused if it is another one."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import Context

from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.model_digest import model_digest
from fedinfer_flower.errors import ConfigError, ModelLoadError, PolicyRefusedError

__all__ = ["PolicyLoader", "source_of"]

_SEE_LOG: Final = "see the site's own log"
_CHUNK_BYTES: Final = 1 << 20

Source = Callable[[Context], object]


def source_of(
    where: str,
    *,
    loader: str,
    kind: str,
    options: Mapping[str, Any],
    classes: tuple[str, ...] = (),
) -> Source:
    """Return the function that loads a model.

    Parameters
    ----------
    where : str
        Table of the policy, for error texts.
    loader : str
        ``"module:function"``; imported now, so that a wrong name is found at the start.
    kind, options : str, mapping
        Of `clients.adapters.make_model`, instead of a loader.
    classes : tuple of str
        For a kind that has an option of this name, where `options` does not give it.

    Raises
    ------
    ConfigError
        If the loader cannot be imported.
    """
    if kind:
        return lambda context: _adapted(kind, options, classes=classes)  # noqa: ARG005
    module, _, path = loader.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as exc:
        raise ConfigError(
            f"[{where}] loader {loader!r} cannot be imported: {type(exc).__name__}",
            hint="install the package at the site, in the environment of the SuperNode",
        ) from None
    if not callable(found):
        raise ConfigError(f"[{where}] loader {loader!r} is no function")
    source: Source = found
    return source


class PolicyLoader:
    """Load the model of a policy's ``[model]``, or refuse to.

    Parameters
    ----------
    source : callable
        From Flower's Context to a model or a `LocalModel`.
    digest : str
        What the model, or the file, must have; empty for any.
    file : path, optional
        File whose digest counts.
    classes : tuple of str
    model_id : str
    price_per_query : float, optional
    name : str
        Tells this loader from others in one process.

    Raises
    ------
    PolicyRefusedError
        When called, if the digest is another one.
    ModelLoadError
        When called, if the source fails; without its text.
    """

    def __init__(
        self,
        source: Source,
        *,
        digest: str = "",
        file: str | Path | None = None,
        classes: tuple[str, ...] = (),
        model_id: str = "",
        price_per_query: float | None = None,
        name: str = "",
    ) -> None:
        self._source, self._digest = source, digest
        self._file = None if file is None else Path(file)
        self._changes: dict[str, Any] = {}
        if classes:
            self._changes["classes"] = classes
        if price_per_query is not None:
            self._changes["price_per_query"] = price_per_query
        self._model_id = model_id
        self.__qualname__ = f"PolicyLoader-{name}"

    def __call__(self, context: Context) -> LocalModel:
        """Return the model with what the policy says of it."""
        of_file = ""
        if self._digest and self._file is not None and self._file.is_file():
            of_file = _file_digest(self._file)
        with contained(ModelLoadError, "load_model failed", hint=_SEE_LOG):
            loaded = self._source(context)
        local = loaded if isinstance(loaded, LocalModel) else LocalModel(model=loaded)
        # What the loader claims counts where nothing can be computed of the model, and the file
        # where nothing is claimed: adapters digest the very bytes that they load.
        found = model_digest(local.model) or local.digest.removeprefix("sha256:") or of_file
        if self._digest and found != self._digest:
            raise PolicyRefusedError(
                "the site's model is not the one that its policy names ([model] digest)",
                hint="the site's operator checks which model is installed",
            )
        changes = dict(self._changes)
        if self._model_id:
            changes["model_card"] = {**local.model_card, "id": self._model_id}
        if of_file and of_file == found and not local.digest:
            changes["digest"] = f"sha256:{of_file}"
        return dataclasses.replace(local, **changes)


def _adapted(kind: str, options: Mapping[str, Any], *, classes: tuple[str, ...]) -> object:
    from fedinfer_flower.clients import adapters

    given = dict(options)
    known: Any = adapters.MODELS.get(kind)
    if classes and "classes" in {field.name for field in dataclasses.fields(known)}:
        given.setdefault("classes", classes)
    return adapters.make_model(kind, given)


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with (
        contained(ModelLoadError, "the model's file cannot be read", hint=_SEE_LOG),
        path.open("rb") as file,
    ):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

"""Name to class, for rules, protections and whatever else is pluggable.

A registry finds its members in three ways: every module of its home package is
imported once (so a new file is registered by existing), third parties publish an entry
point in the registry's group, and anyone may call `register` at run time.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from fedinfer_flower.errors import InvalidValueError, UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9]*([-+][a-z0-9]+)*")


class Registry(Generic[T]):
    """Map kebab-case names to classes.

    Parameters
    ----------
    kind : str
        What the registry holds, for error texts: ``"rule"``, ``"protection"``.
    package : str
        Package whose modules are imported on first use.
    group : str
        Entry-point group under which other distributions publish members.

    Examples
    --------
    >>> from fedinfer_flower.ensemble import RULES
    >>> RULES.get("class-share").__name__
    'ClassShare'
    """

    def __init__(self, *, kind: str, package: str, group: str) -> None:
        self.kind = kind
        self._package = package
        self._group = group
        self._members: dict[str, type[T]] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a decorator that registers a class under `name`.

        Raises
        ------
        InvalidValueError
            If the name is not kebab-case, or taken by another class.
        """
        if not _NAME.fullmatch(name):
            raise InvalidValueError(f"{self.kind} name {name!r} is not kebab-case")

        def decorator(cls: type[T]) -> type[T]:
            taken = self._members.get(name)
            # A module that is imported again (reload, another path) may replace itself.
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise InvalidValueError(
                    f"{self.kind} name {name!r} is taken by {taken.__qualname__}"
                )
            self._members[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return decorator

    def get(self, name: str) -> type[T]:
        """Return the class registered under `name`.

        Raises
        ------
        UnknownNameError
            With the nearest known names.
        """
        self._load()
        if name in self._members:
            return self._members[name]
        near = difflib.get_close_matches(name, self._members, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(self.names())
        raise UnknownNameError(
            f"no {self.kind} is called {name[:64]!r}", hint=hint or f"known: {known}"
        )

    def names(self) -> tuple[str, ...]:
        """Return all registered names, sorted."""
        self._load()
        return tuple(sorted(self._members))

    def _load(self) -> None:
        with self._lock:
            if self._loaded:
                return
            home = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(home.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            for point in entry_points(group=self._group):
                self.register(point.name)(point.load())
            # Last: a module that fails to import must fail again on the next call.
            self._loaded = True

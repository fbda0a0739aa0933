"""Imports large packages without the parts that take most of the time and are never used."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

UNUSED = ("transformers", "huggingface_hub")
"""Packages that mlx-lm imports, and uses only to read tokenizers and to download, which other processes do.

Importing them would take most of the time until the first answer, and half of the memory beside weights.
"""


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Replace packages by stand-ins in imports while this context is open, unless they are imported already.

    Later imports get the real packages. Modules that were imported meanwhile keep the stand-ins.
    """
    names = frozenset(name for name in packages if name not in sys.modules)
    finder = _Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        # a copy: other threads may import meanwhile
        for name in [name for name in [*sys.modules] if name.partition(".")[0] in names]:
            del sys.modules[name]


@contextmanager
def absent(module: str) -> Iterator[None]:
    """Make imports of a module fail while this context is open, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


class _StandInType(type):
    """The type of stand-in classes.

    They are empty, and every other attribute of theirs is a function that does nothing.
    """

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class _StandIn(ModuleType):
    """A stand-in module: it has an empty class for every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandInType(name, (), {"__module__": self.__name__})


class _Finder(MetaPathFinder, Loader):
    """Finds packages, and all modules in them, as stand-ins."""

    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the protocol's
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in has no code."""


def import_transformers() -> None:
    """Import transformers, which reads its 1,700 model files for the names in them, in half of the time for that."""
    finder = _Patching("transformers.utils.import_utils", _read_names_faster)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("transformers")
    finally:
        sys.meta_path.remove(finder)


def _read_names_faster(module: Any) -> None:
    """Make transformers look into each folder once, and search a file for its `__all__` from the end.

    By itself it looks into each folder twice, and splits each file into lines. A release of transformers in which these
    functions are not there stays as it is.
    """
    look = getattr(module, "create_import_structure_from_path", None)
    names = getattr(module, "fetch__all__", None)
    if look is None or names is None:
        return
    found: dict[str, Any] = {}

    def look_once(path: Any, **options: Any) -> Any:
        if options:
            return look(path, **options)
        folder = os.path.dirname(path) if os.path.isfile(path) else os.fspath(path)
        if folder not in found:
            found[folder] = look(folder)
        return found[folder]

    module.create_import_structure_from_path = look_once
    module.fetch__all__ = lambda content: names(content[content.rfind("\n__all__") + 1 :])


class _Patching(MetaPathFinder, Loader):
    """Finds one module normally, and calls a function with it once the module has run."""

    def __init__(self, name: str, patch: Callable[[Any], None]) -> None:
        self._name = name
        self._patch = patch
        self._loader: Any = None

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002 - the protocol's
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == self._name else None
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)

"""Modules that are executed when a name of theirs is used, and what stands in for others."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@contextmanager
def treated(name: str, treat: Callable[[Any], Loader]) -> Iterator[None]:
    """While it lasts, a module of this name is loaded by what ``treat`` makes of its loader."""

    class Finder(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
            spec = PathFinder.find_spec(fullname, path, target) if fullname == name else None
            if spec is not None:
                spec.loader = treat(spec.loader)
            return spec

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class Treating(Loader):
    """A loader that does something else than another one in part."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See Loader."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def __getattr__(self, name: str) -> Any:  # what else loaders have
        return getattr(self.loader, name)


class AtFirstUse(Treating):
    """Makes a module that is executed when a name of it is used."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See Loader."""
        return Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Not yet."""
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader


class PatternsLater(Treating):
    """Executes a module whose regular expressions are compiled when they are used."""

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        with replaced(re, "compile", _LaterPattern):
            self.loader.exec_module(module)


class _LaterPattern:
    """A compiled regular expression, once somebody uses it."""

    def __init__(self, *pattern: Any, **options: Any) -> None:
        self._pattern = pattern, options

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which whoever makes a class looks for in all that it has
            raise AttributeError(name)
        pattern, options = self._pattern
        return getattr(re.compile(*pattern, **options), name)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """While it lasts, ``module`` has another ``value`` of this name."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class Deferred(ModuleType):
    """A module that is executed when a name is used that is not there yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.import_now()
        return getattr(self, name)

    def import_now(self) -> None:
        """Import it; it is what it would have been from then on."""
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)


class WholeFirst(MetaPathFinder):
    """Lets nobody have a part of a deferred package before the whole, which may bring that part.

    ``alone``: a part that comes without it.
    """

    def __init__(self, alone: str) -> None:
        self.alone = alone

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """See MetaPathFinder."""
        package, _, _ = name.rpartition(".")
        later = sys.modules.get(package)
        if not isinstance(later, Deferred) or name == self.alone:
            return None
        later.import_now()
        module = sys.modules.get(name)
        if module is None:
            return None
        loader = _Loaded(module)
        module.__spec__ = ModuleSpec(name, loader)  # else it would be loaded by its own once more
        return module.__spec__


class _Loaded(Loader):
    """Gives a module that has been loaded meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See Loader."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        module.__spec__ = self._spec


class CalledLater(ModuleType):
    """Stands in for a module of which others only take functions, which import it when called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None, is_package=True), []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*args, **options)

        return call


@contextmanager
def called_later(package: str, *modules: str) -> Iterator[None]:
    """While it lasts, functions are taken from a package, and ``modules`` of it, unimported.

    Nothing happens where it is not installed, or imported already.
    """
    stand_ins: dict[str, ModuleType] = {}
    if package not in sys.modules and importlib.util.find_spec(package):
        names = package, *(f"{package}.{module}" for module in modules)
        stand_ins = {name: CalledLater(name) for name in names}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]

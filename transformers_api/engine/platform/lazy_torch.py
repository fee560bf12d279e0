"""torch and transformers without what only compilers and clusters need of them.

``transformers.modeling_utils`` brings ``torch._dynamo`` and torch's distributed tensors: a second
of CPU time at every start and 80 MB for good, for what a server of one process that compiles
nothing does not call. ``import torch`` itself brings what says in Python which shape the results
of 1,500 operations have, and ``import transformers`` reads the sources of all its models, twice.
Here transformers is told that there is nothing to distribute over, it reads once, and the rest is
imported by whoever first uses something of it.

``import_torch`` is all that others call. ``LAZY_TORCH=false`` switches the rest of this module off;
so does another version of torch or transformers than those of ``VERSIONS``, whose private names it
relies on. See docs/decisions/0010-a-lean-start.md. This module itself imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers_api.engine.platform.imports import without_collection

__all__ = ["import_torch"]
log = logging.getLogger(__name__)
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}  # those of requirements.txt
COMPILER = "torch._dynamo"
TRACE_OPERATOR = f"{COMPILER}._trace_wrapped_higher_order_op"  # which transformers needs
SHAPES = "torch._meta_registrations"
SHAPES_BRING = "_decomp", "_prims", "_refs"  # torch asks for them without an import
SCANNER = "transformers.utils.import_utils"
SCAN, EXPORTED = "create_import_structure_from_path", "fetch__all__"


def import_torch(*, lazy: bool = True, transformers: bool = False) -> None:
    """Import torch, and transformers on request; afterwards a call does nothing.

    ``lazy`` False: as ``import`` does. So it is, with a line in the log, in other versions.
    """
    lazy = lazy and _is_supported_version()
    with without_collection():
        if "torch" not in sys.modules:
            _import_lazily() if lazy else importlib.import_module("torch")
        if transformers and "transformers" not in sys.modules:
            is_possible = lazy and COMPILER not in sys.modules
            _import_transformers() if is_possible else importlib.import_module("transformers")


@functools.cache
def _is_supported_version() -> bool:
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in VERSIONS}
    if installed == VERSIONS:
        return True
    names = ", ".join(f"{name} {version}" for name, version in installed.items())
    log.info("Imported as a whole, which takes longer: %s", names)
    return False


def _import_lazily() -> None:
    with _treated(SHAPES, _AtFirstUse):
        torch: Any = importlib.import_module("torch")
    torch.__getattr__ = functools.partial(_missing_of_torch, torch.__getattr__)
    # the one thing that others need of it: before, nobody can make a generator
    from torch._opaque_base import OpaqueBaseMeta

    torch._C._set_generator_metaclass(OpaqueBaseMeta)


def _import_transformers() -> None:
    import torch

    with ExitStack() as scanning:
        scanning.enter_context(_treated(SCANNER, functools.partial(_ScanningOnce, scanning)))
        _distribute_nothing(torch.distributed)
        importlib.import_module("transformers.models")
    compiler: Any = Compiler(COMPILER)
    sys.modules[COMPILER] = torch._dynamo = compiler
    importlib.import_module(TRACE_OPERATOR)
    sys.meta_path.insert(0, _WholeFirst())


def _import_shapes() -> None:
    """Import what was left out of ``import torch``, unless it is there."""
    shapes = sys.modules.get(SHAPES)
    if isinstance(shapes, Deferred):
        shapes.import_now()


def _missing_of_torch(others: Callable[[str], Any], name: str) -> Any:
    whole = f"torch.{name}"
    if name not in SHAPES_BRING or whole in sys.modules:  # which is being imported
        return others(name)
    _import_shapes()
    return sys.modules[whole]


def _distribute_nothing(distributed: Any) -> None:
    """Let transformers ask, once for all, whether torch is one that can."""
    with _replaced(distributed, "is_available", lambda: False):
        from transformers.utils.import_utils import is_torch_distributed_available

        is_torch_distributed_available()


@contextmanager
def _treated(name: str, treat: Callable[[Any], Loader]) -> Iterator[None]:
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


class _Treating(Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def __getattr__(self, name: str) -> Any:  # what else loaders have
        return getattr(self.loader, name)


class _AtFirstUse(_Treating):
    """Makes a module that is executed when a name of it is used."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Not yet."""
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader


class _ScanningOnce(_Treating):
    """Executes transformers' ``import_utils`` and keeps it from looking at anything twice."""

    def __init__(self, scanning: ExitStack, loader: Any) -> None:
        super().__init__(loader)
        self.scanning = scanning

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        self.loader.exec_module(module)
        self.scanning.enter_context(scanning_once(module))


@contextmanager
def scanning_once(scanner: Any) -> Iterator[None]:
    """Give transformers, which looks through its models for what they export, a memory for it."""
    exported: Any = getattr(scanner, EXPORTED)
    cached = functools.cache(getattr(scanner, SCAN))

    def scan_folder(path: str | Path) -> Any:
        text = os.fspath(path)
        return cached(os.path.dirname(text) if os.path.isfile(text) else text)

    def find_exported(source: str) -> Any:  # the last line that begins with it counts
        return exported(source[source.rfind("\n__all__") + 1 :])

    with _replaced(scanner, SCAN, scan_folder), _replaced(scanner, EXPORTED, find_exported):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
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


class Compiler(Deferred):
    """torch's compiler. To exempt or to allow a function can wait until it is there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        self.__spec__, self.__file__, self.__package__ = spec, spec.origin, name
        self.__path__ = list(spec.submodule_search_locations or ())
        self._waiting: list[Callable[[], object]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "disable":
            return self._disable
        if name in ("allow_in_graph", "assume_constant_result"):
            return functools.partial(self._note, name)
        return super().__getattr__(name)

    def _disable(self, function: Any = None, *args: Any, **options: Any) -> Any:
        if function is None:
            return lambda function: self._disable(function, *args, **options)
        if not inspect.isroutine(function):
            self.import_now()
            return self.disable(function, *args, **options)
        called = function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return called(*args, **kwargs)

        def disable() -> None:
            nonlocal called
            called = self.disable(function, *args, **options)

        self._waiting.append(disable)
        return call

    def _note(self, name: str, function: Any) -> Any:
        self._waiting.append(lambda: getattr(self, name)(function))
        return function

    def import_now(self) -> None:
        """Import it, and do what was put off."""
        waiting = self._waiting
        _import_shapes()  # it asks for them without a name
        super().import_now()
        for act in waiting:
            act()


class _WholeFirst(MetaPathFinder):
    """Lets nobody have a part of the compiler before the whole, which brings that part, too."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """See MetaPathFinder."""
        later = sys.modules.get(COMPILER)
        if not isinstance(later, Compiler) or not name.startswith(f"{COMPILER}."):
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

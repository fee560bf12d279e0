"""torch and transformers without what only compilers and clusters need of them.

``transformers.modeling_utils`` brings ``torch._dynamo`` and torch's distributed tensors: a second
of CPU time at every start and 80 MB for good, for what a server of one process that compiles
nothing does not call. ``import torch`` itself brings what says in Python which shape the results
of 1,500 operations have, and ``import transformers`` reads the sources of all its models, twice.
Here transformers is told that there is nothing to distribute over, it reads once in the life of a
model store, and the rest is imported by whoever first uses something of it.

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
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from transformers_api.engine.platform.deferred_modules import (
    AtFirstUse,
    Deferred,
    WholeFirst,
    called_later,
    replaced,
    treated,
)
from transformers_api.engine.platform.imports import without_collection
from transformers_api.engine.platform.transformers_exports import quick_scan

__all__ = ["import_torch"]
log = logging.getLogger(__name__)
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}  # those of requirements.txt
COMPILER = "torch._dynamo"
TRACE_OPERATOR = f"{COMPILER}._trace_wrapped_higher_order_op"  # which transformers needs
SHAPES = "torch._meta_registrations"
# What torch imports, and neither it nor a model that is served needs.
LATER = SHAPES, "torch.export", "torch.masked", "torch.nn.intrinsic", "torch.quantization"
SHAPES_BRING = "_decomp", "_prims", "_refs"  # torch asks for them without an import


def import_torch(
    *, lazy: bool = True, transformers: bool = False, exports: Path | None = None
) -> None:
    """Import torch, and transformers on request; afterwards a call does nothing.

    ``lazy`` False: as ``import`` does. So it is, with a line in the log, in other versions.
    ``exports``: the folder of the list of what transformers exports; see ``quick_scan``.
    """
    lazy = lazy and _is_supported_version()
    with without_collection():
        if "torch" not in sys.modules:
            _import_lazily() if lazy else importlib.import_module("torch")
        if transformers and "transformers" not in sys.modules:
            if lazy and COMPILER not in sys.modules:
                _import_transformers(exports)
            else:
                importlib.import_module("transformers")


@functools.cache
def _is_supported_version() -> bool:
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in VERSIONS}
    if installed == VERSIONS:
        return True
    names = ", ".join(f"{name} {version}" for name, version in installed.items())
    log.info("Imported as a whole, which takes longer: %s", names)
    return False


def _import_lazily() -> None:
    with ExitStack() as treating:
        for name in LATER:
            treating.enter_context(treated(name, AtFirstUse))
        treating.enter_context(replaced(inspect, "getmodule", _module_of))
        torch: Any = importlib.import_module("torch")
    sys.meta_path.insert(0, WholeFirst(alone=TRACE_OPERATOR))
    torch.__getattr__ = functools.partial(_missing_of_torch, torch.__getattr__)
    # the one thing that others need of it: before, nobody can make a generator
    from torch._opaque_base import OpaqueBaseMeta

    torch._C._set_generator_metaclass(OpaqueBaseMeta)


def _module_of(what: Any, _filename: str | None = None) -> ModuleType | None:
    """``inspect.getmodule`` for what says it; else it looks at the files of all modules."""
    if inspect.ismodule(what):
        return what
    return sys.modules.get(getattr(what, "__module__", None) or "")


def _import_transformers(exports: Path | None) -> None:
    import torch

    with quick_scan(exports):
        _distribute_nothing(torch.distributed)
        importlib.import_module("transformers.models")
    compiler: Any = Compiler(COMPILER)
    sys.modules[COMPILER] = torch._dynamo = compiler
    exporter: Any = SimpleNamespace(allow_in_pre_dispatch_graph=_allowed)
    torch._export = SimpleNamespace(wrappers=exporter)  # type: ignore[assignment]
    importlib.import_module(TRACE_OPERATOR)
    del torch._export
    with called_later("accelerate", "hooks", "utils", "utils.modeling"):
        for name in ("transformers.modeling_utils", "transformers.generation.utils"):
            importlib.import_module(name)


def _allowed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as one that torch's exporter takes as it is, when it is called."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        from torch._export import wrappers

        allow: Any = wrappers.allow_in_pre_dispatch_graph
        return allow(function)(*args, **options)

    return call


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
    with replaced(distributed, "is_available", lambda: False):
        from transformers.utils.import_utils import is_torch_distributed_available

        is_torch_distributed_available()


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

"""transformers without what only compilers and clusters need of torch.

``transformers.modeling_utils`` brings ``torch._dynamo`` and torch's distributed tensors: a second
of CPU time at every start and 80 MB for good, for what a server of one process that compiles
nothing does not call. Here transformers is told that there is nothing to distribute over, and
torch's compiler is imported by whoever first wants something of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

COMPILER = "torch._dynamo"
NEEDED = f"{COMPILER}._trace_wrapped_higher_order_op"  # by transformers; it stands on its own


def import_lean() -> None:
    """Before the first import of transformers; after it this does nothing."""
    if "transformers" in sys.modules or COMPILER in sys.modules:
        return
    _distribute_nothing(torch.distributed)
    later: Any = Later(COMPILER)
    sys.modules[COMPILER] = torch._dynamo = later
    importlib.import_module(NEEDED)
    sys.meta_path.insert(0, _WholeFirst())


def _distribute_nothing(distributed: Any) -> None:
    """Let transformers ask, once for all, whether torch is one that can."""
    is_available = distributed.is_available
    distributed.is_available = lambda: False
    try:
        from transformers.utils.import_utils import is_torch_distributed_available

        is_torch_distributed_available()
    finally:
        distributed.is_available = is_available


class Later(ModuleType):
    """torch's compiler, imported when something is wanted that is not there yet.

    That it should leave a function alone, or know it, can wait until then.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        self.__spec__, self.__file__, self.__package__ = spec, spec.origin, name
        self.__path__ = list(spec.submodule_search_locations or ())
        self._waiting: list[Callable[[], object]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "disable":
            return self._disable
        if name in ("allow_in_graph", "assume_constant_result"):
            return functools.partial(self._note, name)
        self.import_now()
        return getattr(self, name)

    def _disable(self, function: Any = None, *given: Any, **options: Any) -> Any:
        if function is None:
            return lambda function: self._disable(function, *given, **options)
        if not inspect.isroutine(function):
            self.import_now()
            return self.disable(function, *given, **options)
        called = function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return called(*args, **kwargs)

        def disable() -> None:
            nonlocal called
            called = self.disable(function, *given, **options)

        self._waiting.append(disable)
        return call

    def _note(self, name: str, function: Any) -> Any:
        self._waiting.append(lambda: getattr(self, name)(function))
        return function

    def import_now(self) -> None:
        """Import it; it is what it would have been from then on."""
        spec, waiting = self.__spec__, self._waiting
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        for act in waiting:
            act()


class _WholeFirst(MetaPathFinder):
    """Lets nobody have a part of the compiler before the whole, which brings that part, too."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """See MetaPathFinder."""
        later = sys.modules.get(COMPILER)
        if not isinstance(later, Later) or not name.startswith(f"{COMPILER}."):
            return None
        later.import_now()
        module = sys.modules.get(name)
        if module is None:
            return None
        found = _Found(module)
        module.__spec__ = ModuleSpec(name, found)  # else it would be loaded by its own once more
        return module.__spec__


class _Found(Loader):
    """Gives a module that has been loaded meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See Loader."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        module.__spec__ = self._spec


class ShapesOnly(TorchFunctionMode):
    """While it lasts, tensors on ``meta``, which have no numbers, are made without the compiler.

    torch would import it to find out that there is nothing to draw, and what shape angles have.
    """

    DRAWING = frozenset(
        (Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_)
    )
    ANGLES = frozenset((Tensor.div, Tensor.__rdiv__, Tensor.__rpow__))  # 1 / base ** (n / size)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if func is torch.arange and str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs | {"device": "cpu"}).to("meta")
        if isinstance(tensor, Tensor) and tensor.is_meta:
            alike: dict[str, Any] = {"size": tensor.shape, "dtype": tensor.dtype}
            if func in self.DRAWING:
                return tensor
            if func in self.ANGLES and isinstance(args[1], int | float) and not kwargs:
                return func(torch.zeros(**alike, device="cpu"), args[1]).to("meta")
            if func is torch.empty_like and kwargs.keys() == {"device"}:
                return torch.empty(**alike, **kwargs)
        return func(*args, **kwargs)

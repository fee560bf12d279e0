"""Adapters in passes that call a model's modules: what they add, each to the rows of its sequences.

Hooks are there for the duration of a pass in which a sequence has an adapter, and for no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from transformers_api.engine.not_finite import showing_overflow

if TYPE_CHECKING:
    from transformers_api.engine.adapters import LoadedAdapter, LowRankProduct, MakeProduct


LARGEST = 1e17  # of what is added; a norm would make zeros of much more: see showing_overflow
PROBE = (1, 2, 3, 1, 2)  # token ids; every vocabulary has them


class TorchProduct:
    """Meets LowRankProduct, by torch."""

    def __init__(
        self, down: Tensor, up: Tensor, rescaling: tuple[Tensor, ...] | None = None
    ) -> None:
        self.down, self.up, self.rescaling = down, up, rescaling
        self.nbytes = sum(each.nbytes for each in (down, up, *(rescaling or ())))

    def __call__(self, x: Tensor) -> Tensor:
        """See LowRankProduct."""
        return linear(linear(x.to(self.down.dtype), self.down), self.up).to(x.dtype)


class AdaptsModules:
    """The part of a runner that makes adapters for passes through the model's modules."""

    model: Any

    def adapter_maker(self) -> MakeProduct:
        """See AdapterRunner. float32 on a CPU; elsewhere in the model's own dtype."""
        device = self.model.device
        dtype = torch.float32 if device.type == "cpu" else self.model.dtype
        whole = read_by_every_token(self.model)

        def make(path: str, down: Tensor, up: Tensor, rescaling: Any = None) -> TorchProduct:
            if path not in whole:
                raise ValueError(f"{path} of the base is no layer that every token goes through")
            own = rescaling and tuple(each.to(device, dtype) for each in rescaling)
            return TorchProduct(down.to(device, dtype), up.to(device, dtype), own)

        return make

    def drop_adapter(self, adapter: LoadedAdapter) -> None:
        """See AdapterRunner: it holds none."""


def read_by_every_token(model: Any) -> set[str]:
    """Paths of the layers that a pass over some tokens shows each of them; an expert gets a few.

    Rows of any other layer could not be told apart by their sequences.
    """
    rows: dict[str, list[int]] = {}
    with ExitStack() as hooks:
        for path, module in model.named_modules():

            def note(_module: nn.Module, args: Any, _output: Any, path: str = path) -> None:
                if args and isinstance(args[0], Tensor) and args[0].dim():
                    rows.setdefault(path, []).append(args[0].numel() // args[0].shape[-1])

            hooks.callback(module.register_forward_hook(note).remove)
        ids = torch.tensor([PROBE], device=model.device)
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, return_dict=True)
    return {path for path, each in rows.items() if set(each) == {len(PROBE)}}


def layer_at(model: nn.Module, path: str) -> tuple[str, tuple[int, int]]:
    """The path of a layer in a model, its inputs, outputs.

    ``path``: in it, in its body without a head, or in a model that it is the language part of.
    Raises ValueError where there is no linear layer.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for own in (path, f"{prefix}.{path}" if prefix else path, path.replace("language_model.", "")):
        try:
            layer: Any = model.get_submodule(own)
        except AttributeError:
            continue
        if hasattr(layer, "in_features"):
            return own, (layer.in_features, layer.out_features)
        if hasattr(layer, "nx"):  # transformers' Conv1D
            return own, (layer.nx, layer.nf)
        raise ValueError(f"{own} of the base is no linear layer, but {type(layer).__name__}")
    raise ValueError(f"the base has no layer {path}")


@contextmanager
def adapted(
    model: nn.Module, adapters: Sequence[LoadedAdapter | None], padding: int = 0
) -> Iterator[None]:
    """While it lasts, passes of the model go through ``adapters``: one of each sequence, or None.

    ``padding``: sequences behind these, which have none.
    """
    users: dict[str, list[LoadedAdapter]] = {}
    for adapter in {id(each): each for each in adapters if each is not None}.values():
        for path in adapter.products:
            users.setdefault(path, []).append(adapter)
    if not users:
        yield
        return
    with ExitStack() as hooks:
        hooks.enter_context(showing_overflow(model))
        rows = _Rows([*adapters, *[None] * padding])
        for path, own in users.items():
            products = [(adapter, adapter.products[path]) for adapter in own]
            handle = model.get_submodule(path).register_forward_hook(
                _Adding(path, rows, products), prepend=True
            )
            hooks.callback(handle.remove)
        yield


class _Rows:
    """The rows of each adapter among those that a layer reads."""

    def __init__(self, adapters: Sequence[LoadedAdapter | None]) -> None:
        self.adapters = adapters
        self._indices: dict[tuple[int, int], Tensor | None] = {}

    def of(self, adapter: LoadedAdapter, each: int, device: torch.device) -> Tensor | None:
        """Indices of the rows, ``each`` of every sequence; None: all rows."""
        key = id(adapter), each
        if key not in self._indices:
            own = [place for place, other in enumerate(self.adapters) if other is adapter]
            index = torch.tensor(own)[:, None] * each + torch.arange(each)
            is_all = len(own) == len(self.adapters)
            self._indices[key] = None if is_all else index.flatten().to(device)
        return self._indices[key]


class _Adding:
    """The hook of one layer."""

    def __init__(
        self, path: str, rows: _Rows, products: list[tuple[LoadedAdapter, LowRankProduct]]
    ) -> None:
        self.path = path
        self.rows = rows
        self.products = products

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(-1, args[0].shape[-1])
        each, rest = divmod(len(x), len(self.rows.adapters))
        if rest:
            raise ValueError(f"{self.path} reads {len(x)} rows, not the same of every sequence")
        made = output.reshape(-1, output.shape[-1])
        for adapter, product in self.products:
            index = self.rows.of(adapter, each, x.device)
            added = product(x if index is None else x[index])
            added = added.masked_fill(added.abs() > LARGEST, torch.nan).to(made.dtype)
            if product.rescaling is not None:
                gain, offset = product.rescaling
                own = made if index is None else made[index]
                added = added + (own * (gain - 1) + offset).to(made.dtype)
            made = made + added if index is None else made.index_add(0, index, added)
        return made.view(output.shape)

"""The dependence of a metric on each number of a part of layers, from one backward pass.

Attribution patching: Nanda 2023; Kramár and others 2024, arXiv:2403.00745, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.watched_pass import first_of, stream_of
from transformers_api.inspection.attribution import embedded
from transformers_api.inspection.places import Module
from transformers_api.inspection.reading import Way, read, unarmed


@dataclass(frozen=True, slots=True)
class Slope:
    """The numbers (T, width) of a part, float32, and the gradient of the metric at them."""

    rows: Tensor
    gradient: Tensor


def slopes(
    model: Any,
    way: Way,
    ids: list[int],
    modules: Mapping[int, Module],
    metric: Callable[[Tensor], Tensor],
    embedding: Module | None,
    noise: Tensor | None,
) -> tuple[float, dict[int, Slope]]:
    """(the metric of a text, the slope of each layer). ``noise`` (T, C): on its embeddings.

    Raises ModelNotCapable.
    """
    way.check_gradients()
    parts: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as hooks:
        tokens = torch.tensor([ids], device=model.device)
        leaf = model.get_input_embeddings()(tokens).detach().clone().requires_grad_()
        hooks.enter_context(embedded(model, leaf))
        hooks.enter_context(way.armed(model, unarmed)(0, len(ids)))  # before what is noted
        for layer, module in modules.items():
            hooks.callback(_noting(model, module, layer, parts).remove)
        if noise is not None and embedding is not None:
            hooks.callback(_disturbing(model, embedding, noise).remove)
        (chunk,) = read(model, tokens, 0)
        value = metric(chunk.logits[:, -1, : way.vocab_size].float()).sum()
        order = list(parts)
        gradients = torch.autograd.grad(value, [parts[layer] for layer in order])
    return float(value.detach()), {
        layer: Slope(parts[layer].detach()[0].float(), gradient[0].float())
        for layer, gradient in zip(order, gradients, strict=True)
    }


def _noting(model: Any, module: Module, layer: int, parts: dict[int, Tensor]) -> Any:
    own = model.get_submodule(module.name)

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        parts[layer] = stream_of(args, kwargs)  # type: ignore[assignment]

    def after(_module: Any, _args: Any, output: Any) -> None:
        parts[layer] = first_of(output)  # type: ignore[assignment]

    if module.side == "in":
        return own.register_forward_pre_hook(before, with_kwargs=True)
    return own.register_forward_hook(after)


def _disturbing(model: Any, embedding: Module, noise: Tensor) -> Any:
    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        stream: Any = stream_of(args, kwargs)
        other = (stream.float() + noise.clone()).to(stream.dtype)
        changed = tuple(other if value is stream else value for value in args)
        return changed, {
            name: other if value is stream else value for name, value in kwargs.items()
        }

    return model.get_submodule(embedding.name).register_forward_pre_hook(before, with_kwargs=True)

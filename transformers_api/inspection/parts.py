"""The parts of a model, found by watching one small forward pass; no table of names.

Everything here runs on the engine thread. ``Parts`` has names and no modules: who keeps it keeps
no model alive.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from transformers_api.engine.places import PlaceFinder
from transformers_api.engine.watched_pass import (
    Call,
    first_of,
    layer_names,
    stream_of,
    watched_pass,
)
from transformers_api.inspection.base import Routing

log = logging.getLogger(__name__)
LENS_TOLERANCE = 1e-3  # relative; a lens further off does not read what the model says


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Names of a model's modules; None and () where something was not found."""

    layers: tuple[str, ...] = ()  # they carry the residual stream, in this order
    decoder: str | None = None  # what holds them; its output goes to the head
    decoder_output: Any = tuple  # the class of that output
    final_norm: str | None = None  # from the last layer to the decoder's output
    head: str | None = None  # the output embedding
    routers: tuple[tuple[int, str], ...] = ()  # (layer, name) of mixtures of experts
    routing: Routing | None = None
    places: PlaceFinder = field(default_factory=PlaceFinder, compare=False)  # of the layers
    lens: bool = False  # residuals can be read as logits
    lens_is_exact: bool = False  # those of the last layer are the model's own logits, to the bit

    def layer_modules(self, model: Any) -> list[nn.Module]:
        """The decoder layers of ``model``."""
        return [model.get_submodule(name) for name in self.layers]


def find_parts(model: Any) -> Parts:
    """The parts that one forward pass over three tokens shows; none where its code fails."""
    try:
        return _find(model)
    except Exception:  # of that code, which may be anybody's
        log.warning("%s: its parts were not found", type(model).__name__, exc_info=True)
        return Parts()


def _find(model: Any) -> Parts:
    calls, logits = watched_pass(model)
    layers = layer_names(model, calls)
    names = {id(module): name for name, module in model.named_modules()}
    routers = _routers(layers, calls)
    parts = Parts(
        layers=layers,
        head=names.get(id(model.get_output_embeddings())),
        routers=tuple((layer, call.name) for layer, call in routers),
        routing=_routing(routers),
    )
    decoder = _decoder(layers, calls)
    if decoder is None or decoder.result is None:
        return parts
    parts = replace(
        parts,
        decoder=decoder.name,
        decoder_output=type(decoder.output),
        final_norm=_producer(calls, decoder.result, layers),
    )
    return _with_lens(model, parts, calls, logits)


def _producer(calls: list[Call], stream: Tensor, layers: Sequence[str]) -> str | None:
    """The leaf that made ``stream``: the first with that memory. None where it is in a layer."""
    for call in calls:
        result = call.result
        if call.is_leaf and result is not None and result.data_ptr() == stream.data_ptr():
            inside = any(call.name.startswith(f"{layer}.") for layer in layers)
            return None if inside or result.numel() != stream.numel() else call.name
    return None


def _decoder(layers: Sequence[str], calls: list[Call]) -> Call | None:
    """The outermost module around the layers that the model calls."""
    if not layers:
        return None
    called = {call.name: call for call in calls}
    names = layers[0].split(".")
    around = (".".join(names[:depth]) for depth in range(1, len(names)))
    return next((called[name] for name in around if name in called), None)


def _routers(layers: Sequence[str], calls: list[Call]) -> list[tuple[int, Call]]:
    """The routers in the layers, one per layer."""
    routers: dict[int, Call] = {}
    for call in calls:
        for index, layer in enumerate(layers):
            if call.name.startswith(f"{layer}.") and routed_of(call.output) is not None:
                routers.setdefault(index, call)
    return sorted(routers.items())


def _routing(routers: list[tuple[int, Call]]) -> Routing | None:
    if not routers:
        return None
    logits, weights, _ = routers[0][1].output
    layers = tuple(layer for layer, _ in routers)
    return Routing(layers=layers, experts=logits.shape[1], experts_per_token=weights.shape[1])


def _with_lens(model: Any, parts: Parts, calls: list[Call], logits: Tensor) -> Parts:
    """``parts`` with what reading the last residual stream through the head really gives."""
    residual = [call.result for call in calls if call.name == parts.layers[-1]][-1]
    assert residual is not None
    try:
        read = lens_logits(model, parts, residual[0])
    except Exception:
        log.info("%s: no lens", type(model).__name__, exc_info=True)
        return parts
    own = logits.float()
    if read.shape != own.shape or (read - own).norm() > LENS_TOLERANCE * own.norm():
        return parts
    return replace(parts, lens=True, lens_is_exact=torch.equal(read, own))


# -- reading with them


def lens_logits(model: Any, parts: Parts, residuals: Tensor) -> Tensor:
    """Residuals (N, C) after a layer as logits (N, V) float32, through final norm and head.

    V is the head's own: ids that the tokenizer lacks are included.
    """
    norm = model.get_submodule(parts.final_norm) if parts.final_norm else None
    hidden = residuals[None] if norm is None else norm(residuals[None])
    return head_logits(model, parts, hidden[0])


def head_logits(model: Any, parts: Parts, hidden: Tensor) -> Tensor:
    """Outputs (N, C) of the decoder as logits (N, V) float32.

    The model itself runs, with a decoder that says at once what it is to say: a soft-cap, a scale
    or a bias around the head is in.
    """
    assert parts.decoder is not None
    decoder = model.get_submodule(parts.decoder)
    stream = hidden[None]
    made = parts.decoder_output
    output = (stream,) if made is tuple else made(last_hidden_state=stream)
    decoder.forward = lambda *_args, **_kwargs: output
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        del decoder.forward  # the class's own again
    return logits[0].float()


@contextmanager
def residuals_of(
    model: Any, parts: Parts, layers: Sequence[int], take: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While it lasts, ``take(layer, residual (B, T, C))`` of every forward; -1 is the embedding."""

    def after(index: int) -> Any:
        return lambda _module, _args, output: take(index, first_of(output))  # type: ignore[arg-type]

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        take(-1, stream_of(args, kwargs))  # type: ignore[arg-type]

    modules = parts.layer_modules(model)
    with ExitStack() as stack:
        for index in layers:
            if index < 0:
                handle = modules[0].register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = modules[index].register_forward_hook(after(index))
            stack.callback(handle.remove)
        yield


@contextmanager
def routers_of(
    model: Any, parts: Parts, take: Callable[[int, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """While it lasts, ``take(layer, logits (N, E), weights (N, k), experts (N, k))`` per forward.

    N: the tokens of the batch, row after row.
    """

    def after(layer: int) -> Any:
        return lambda _module, _args, output: take(layer, *output)

    with ExitStack() as stack:
        for layer, name in parts.routers:
            handle = model.get_submodule(name).register_forward_hook(after(layer))
            stack.callback(handle.remove)
        yield


def routed_of(output: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """(logits (N, E), weights (N, k), experts (N, k)) where that is what a module returned."""
    if not (isinstance(output, tuple) and len(output) == 3):
        return None
    if not all(isinstance(part, Tensor) and part.dim() == 2 for part in output):
        return None
    logits, weights, experts = output
    fits = weights.shape == experts.shape and len(logits) == len(weights)
    floating = logits.is_floating_point() and weights.is_floating_point()
    if not (fits and floating and weights.shape[1] <= logits.shape[1]):
        return None
    return None if experts.is_floating_point() else output

"""The examination of a model at load: what can be shown, checked; on the engine thread."""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.backend import Backend
from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.runners.model_runner import Runner, innermost
from transformers_api.engine.sequence import Sequence
from transformers_api.inspection.attention import Attended, AttentionSource, Weights, install_tap
from transformers_api.inspection.base import (
    Anatomy,
    AttentionMode,
    LayerAttention,
)
from transformers_api.inspection.parts import Parts, find_parts

log = logging.getLogger(__name__)
PROBE_TOKENS = 12  # short, and longer than a window that a test model may have
# The largest |P V - out| that rounding explains; a lost mask or a wrong scale gives 0.3 and more.
TOLERANCE = {torch.float32: 1e-4}
ROUNDED = 2e-2  # bfloat16, float16
KINDS = ("layer_types", "layers_block_type", "attention_layers", "block_types")
WINDOWS = {"sliding_attention": ("sliding_window",), "chunked_attention": ("attention_chunk_size",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """The result for one model. Names only: it keeps no model alive."""

    anatomy: Anatomy
    parts: Parts
    source: AttentionSource


@dataclass(slots=True)
class _LayerFigures:
    """The figures of a layer that was watched."""

    heads: int
    kv_heads: int
    sinks: bool
    error: float | None = None


@dataclass(slots=True)
class _Probe:
    """A watcher that checks the weights of each layer."""

    layers: dict[int, _LayerFigures] = field(default_factory=dict)

    def __call__(self, layer: int, weights: Weights) -> None:
        if isinstance(weights, Attended):
            before = self.layers.get(layer)
            error = max(weights.error(), before.error or 0 if before else 0)
            self.layers[layer] = _LayerFigures(
                weights.heads, weights.kv_heads, weights.has_sinks, error
            )


def examine(
    model: Any,
    *,
    vocab_size: int,
    context: int,
    backend: Backend | None = None,
    runner: Runner | None = None,
) -> Examined:
    """Run a few tokens and see. Never raises for a model that merely shows little.

    ``backend``, ``runner``: of the model, where it is served; None: the model as it is.
    """
    config = model.config.get_text_config(decoder=True)
    ids = _probe_ids(model, vocab_size, context)
    parts = find_parts(model)
    source, figures = _find_attention(model, backend, runner, ids, parts)
    numbers = weights = str(model.dtype).removeprefix("torch.")
    if backend is not None:
        facts = backend.describe(innermost(runner))
        numbers, weights = facts.dtype, facts.weights
    is_coded = runner is not None and getattr(innermost(runner).cache, "has_codes", False)
    exact = torch.bfloat16 if is_coded else getattr(torch, numbers)  # in which attention computes
    layers = _layers(config, source, figures, exact)
    errors = [layer.max_rel_err for layer in layers if layer.max_rel_err is not None]
    figure = next((layer for layer in layers if layer.available), None)
    live = figure is not None and source.mode in (AttentionMode.TAP, AttentionMode.HOOK)
    hidden = config.hidden_size
    heads = figure.heads if figure else getattr(config, "num_attention_heads", None) or 0
    anatomy = Anatomy(
        model_type=model.config.model_type,
        layers=len(layers),
        heads=heads,
        kv_heads=figure.kv_heads if figure else 0,
        head_dim=getattr(config, "head_dim", None) or hidden // max(heads, 1),
        hidden_size=hidden,
        vocab_size=vocab_size,
        context=context,
        dtype=weights,
        mode=source.mode if figure else AttentionMode.NONE,
        implementation=source.implementation,
        verified=live,
        max_rel_err=max(errors, default=None),
        attention=tuple(layers),
        final_norm=parts.final_norm,
        lens=parts.lens,
        lens_is_exact=parts.lens_is_exact,
        routing=parts.routing,
        traces_attention=live,
    )
    return Examined(anatomy=anatomy, parts=parts, source=source)


def _probe_ids(model: Any, vocab_size: int, context: int) -> Tensor:
    """(1, T) random tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    count = max(min(PROBE_TOKENS, context), 1)
    ids = torch.randint(0, vocab_size, (1, count), generator=generator)
    return ids.to(model.device)


def _find_attention(
    model: Any, backend: Backend | None, runner: Runner | None, ids: Tensor, parts: Parts
) -> tuple[AttentionSource, dict[int, _LayerFigures]]:
    config = model.config.get_text_config(decoder=True)
    name = getattr(config, "_attn_implementation", None) or "eager"
    if install_tap(name):
        source = AttentionSource(AttentionMode.TAP, name, backend=backend)
        probe = _Probe()
        with source.watched(model, probe):
            if backend is None or runner is None or backend.runs_modules:
                model(input_ids=ids, use_cache=False, return_dict=True)
            else:
                _read(runner, ids)
        if probe.layers:
            return source, probe.layers
    if passing := _weights_passing(model, ids):
        outputs = tuple(
            (_layer_of(module, place, parts), module, index)
            for place, (module, index, _) in enumerate(passing)
        )
        kv_heads = getattr(config, "num_key_value_heads", None)
        figures = {
            layer: _LayerFigures(shape[0], kv_heads or shape[0], shape[1] < 0.999)
            for (layer, *_), (*_, shape) in zip(outputs, passing, strict=True)
        }
        has_sinks = any(layer.sinks for layer in figures.values())
        return AttentionSource(AttentionMode.HOOK, name, outputs, has_sinks), figures
    if weights := asked_weights(model, ids):
        heads = {layer: each.shape[1] for layer, each in weights.items()}
        figures = {layer: _LayerFigures(count, count, False) for layer, count in heads.items()}
        return AttentionSource(AttentionMode.LEGACY, name), figures
    return AttentionSource(AttentionMode.NONE, name), {}


def _read(runner: Runner, ids: Tensor) -> None:
    """Read a prompt and do a step, as they are served."""
    first, *rest = ids[0].tolist()
    prompt, step = [first, *rest[:-1]], rest[-1:]
    request = SequenceRequest(prompt, SamplingParams(max_tokens=2))
    stream = TokenStream(1, lambda _: None)
    seq = Sequence(
        request, stream, 0, eos_token_ids=frozenset(), max_model_len=1 << 30, observe={"": None}
    )
    seq.slot = 0
    runner.cache.reserve(1, ids.shape[1])
    for tokens in ([], step):
        seq.tokens += tokens
        width = len(seq.tokens) - seq.num_cached
        if width:
            runner.forward(Batch([seq], [width]))
            seq.num_cached += width
    runner.clear()


def _weights_passing(model: Any, ids: Tensor) -> list[tuple[str, int, tuple[int, float]]]:
    """(module, index in its output, (heads, smallest row sum)) of weights computed anyway.

    Known by their looks: (1, H, T, T), nothing above the diagonal, rows that sum to 1 or less.
    """
    passing: list[tuple[str, int, tuple[int, float]]] = []
    alive: list[Tensor] = []  # so that each has an address of its own

    def look(name: str, output: Any) -> None:
        for index, part in enumerate(output if isinstance(output, tuple) else (output,)):
            if are_weights(part, ids.shape[1]) and all(
                part.data_ptr() != other.data_ptr() for other in alive
            ):
                alive.append(part)
                passing.append((name, index, (part.shape[1], float(part.float().sum(-1).min()))))

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        model(input_ids=ids, use_cache=False, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    return passing


def are_weights(part: Any, length: int) -> bool:
    """True for what looks like the attention of one sequence of ``length`` tokens: (1, H, T, T)."""
    if not isinstance(part, Tensor) or part.shape[:1] + part.shape[2:] != (1, length, length):
        return False
    sums = part.float().sum(-1)
    is_causal = not part.triu(1).abs().any()
    return is_causal and bool(sums.max() < 1.01) and bool(sums.min() > 0)


def asked_weights(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """Layer to weights (1, H, T, T), of a model that gives them when it is asked to.

    Asked in its eager way: Falcon adds a mask made for SDPA to its scores, as if it were no mask.
    """
    config = model.config.get_text_config(decoder=True)
    name = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        output = model(input_ids=ids, use_cache=False, output_attentions=True, return_dict=True)
    except (TypeError, ValueError):
        return {}
    finally:
        config._attn_implementation = name
    weights = getattr(output, "attentions", None) or ()
    return {layer: part for layer, part in enumerate(weights) if are_weights(part, ids.shape[1])}


def _layer_of(module: str, place: int, parts: Parts) -> int:
    inside = (
        layer
        for layer, name in enumerate(parts.layers)
        if module == name or module.startswith(f"{name}.")
    )
    return next(inside, place)


def _layers(
    config: Any, source: AttentionSource, figures: dict[int, _LayerFigures], dtype: torch.dtype
) -> list[LayerAttention]:
    count = max(getattr(config, "num_hidden_layers", 0) or 0, max(figures, default=-1) + 1)
    kinds = _kinds(config, count)
    most = TOLERANCE.get(dtype, ROUNDED)
    layers = []
    for layer in range(count):
        figure = figures.get(layer)
        window = _window(config, kinds[layer] if kinds else None)
        plain = "sliding_attention" if window else "full_attention"
        kind = kinds[layer] if kinds else plain if figure else config.model_type
        if figure is None:
            layers.append(LayerAttention(layer=layer, type=kind, reason=kind))
            continue
        is_right = figure.error is None or figure.error <= most
        layers.append(
            LayerAttention(
                layer=layer,
                type=kind,
                heads=figure.heads,
                kv_heads=figure.kv_heads,
                window=window,
                sinks=figure.sinks,
                available=is_right,
                reason=None if is_right else "not verified",
                max_rel_err=figure.error,
            )
        )
        if not is_right:
            log.warning("Layer %d: attention weights are off by %g", layer, figure.error)
    return layers


def _kinds(config: Any, count: int) -> SequenceOf[str] | None:
    """The kind of each layer, where the configuration says it."""
    for name in KINDS:
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and kinds and all(isinstance(k, str) for k in kinds):
            return [kinds[layer % len(kinds)] for layer in range(count)]
    return None


def _window(config: Any, kind: str | None) -> int | None:
    """Tokens that a query sees, itself included."""
    names = WINDOWS.get(kind, ()) if kind is not None else ("sliding_window",)
    return next((size for name in names if (size := getattr(config, name, None))), None)

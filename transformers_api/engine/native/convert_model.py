"""From a loaded model to one that runs on the kernels, or the reason why it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from transformers_api.engine.backend import BackendRefused, PlanOutdated
from transformers_api.engine.load_options import SMALL_BYTES
from transformers_api.engine.native.kv_cache import NativeCache
from transformers_api.engine.native.latent import latent_layers
from transformers_api.engine.native.runner import Kind, NativeRunner
from transformers_api.engine.native.state_cache import NativeStateCache
from transformers_api.engine.native.state_runner import NativeStateRunner
from transformers_api.engine.stored_weights import StoredWeights
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.attention import NAME, register
from transformers_api.kernels.modules.experts import PackedExperts, expert_layers
from transformers_api.kernels.modules.linear import NativeEmbedding, NativeLinear, PackedWeight
from transformers_api.kernels.modules.own_attention import computes_own_attention
from transformers_api.kernels.modules.replace import Place, Widths, pack_model
from transformers_api.kernels.modules.weight_memory import OtherWeights, WeightMemory

log = logging.getLogger(__name__)
CACHE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Four bits lose about 8 % of weights that were not made of four bits before. A small model shows it
# (docs/decisions/0008-quantisation.md), so that below INT4_ENOUGH weights the loss is limited.
INT4_ENOUGH = 3_000_000_000
INT4_MOST_LOST = 0.02


def weight_kind(dtype: str, stored: str, stored_bytes: int) -> str | None:
    """Return the format of weights for ``dtype`` and a file of ``stored``; None: not natively."""
    if dtype == "auto":
        return "float32" if stored == "float32" and stored_bytes <= SMALL_BYTES else "bfloat16"
    return dtype if dtype in CACHE_TYPES else None


def kind_of(
    model: Any, dtype: str, quantization: str = "none", kv_cache_dtype: str = "auto"
) -> Kind:
    """Return the format for a model as it was loaded. Raises BackendRefused."""
    stored: StoredWeights | None = getattr(model, "stored_weights", None)
    stored_bytes = stored.bytes if stored else sum(each.nbytes for each in model.parameters())
    own = model.config.dtype if stored else model.dtype  # its layers may be in no memory yet
    kind = weight_kind(dtype, str(own).removeprefix("torch."), stored_bytes)
    if kind is None:
        raise BackendRefused(f"no kernels for {dtype}")
    if quantization != "none" and dtype == "auto":
        kind = "bfloat16"  # also of a small checkpoint: what is rounded is not exact anyway
    return Kind(kind, quantization, kv_cache_dtype == "int8")


def native_runner(
    model: Any,
    library: Library,
    kind: Kind,
    groups: list[list[Place]],
    cache_size: tuple[list[tuple[str, int]] | int, int, int],
    vocab_size: int,
    teach: Callable[[NativeRunner], None],
    original_window: int | None = None,
    memory: WeightMemory | None = None,
) -> NativeRunner:
    """A runner for the model, whose weights are packed by this.

    Raises BackendRefused, PlanOutdated.
    ``groups``: see ``layer_groups``. ``cache_size``: layers, or their kinds where some are
    recurrent; rows; tokens of a row. ``teach``: how the runner comes to know the passes, as by
    ``NativeRunner.learn``. ``original_window``: see ``ModelRunner``. ``memory``: for the weights,
    or with them.
    """
    register()
    try:
        is_own = computes_own_attention(model)
        if not is_own:
            model.set_attn_implementation(NAME)
        widths = Widths(kind.numbers, kind.quantization)
        pack_model(model, library, widths, groups, memory)
        layers, rows, length = cache_size
        # Prompts of a recurrent model are read by its modules: its own attention takes no codes.
        holds_codes = kind.has_int8_cache and (isinstance(layers, int) or not is_own)
        rest = rows, length, CACHE_TYPES[kind.numbers], latent_layers(model), holds_codes
        runner = (
            NativeRunner(
                model, NativeCache(library, layers, *rest), vocab_size, kind, original_window
            )
            if isinstance(layers, int)
            else NativeStateRunner(
                model, NativeStateCache(library, layers, *rest), vocab_size, kind
            )
        )
        teach(runner)
    except PlanOutdated:
        raise
    except OtherWeights as error:
        raise PlanOutdated(str(error)) from error
    except Exception as error:
        log.info("%s cannot be packed", type(model).__name__, exc_info=True)
        raise BackendRefused(f"packing failed: {error}") from error
    if failure := runner.failure:
        raise BackendRefused(failure)
    return runner


def packed_bytes(model: Any) -> int:
    """Bytes of the packed weights."""
    return sum(weight.nbytes for weight in packed_weights(model))


def packed_weights(model: Any) -> list[PackedWeight | PackedExperts]:
    """Each once."""
    packed: dict[int, PackedWeight | PackedExperts] = {
        id(weight): weight
        for module in model.modules()
        if isinstance(module, NativeLinear | NativeEmbedding)
        for weight in [module.joined.weight if isinstance(module, NativeLinear) else module.packed]
    }
    experts = (each for m in expert_layers(model) for each in (m.packed_up, m.packed_down))
    return [*packed.values(), *experts]


def largest_loss(model: Any) -> float:
    """The loss by int4 in the layer that it changed most, as a share of the weights' norm."""
    return max((weight.error for weight in packed_weights(model)), default=0.0)


def check_loss(model: Any, quantization: str) -> None:
    """Raises BackendRefused for a small model that int4 changed too much."""
    if quantization != "int4":
        return
    weights = sum(weight.in_features * weight.out_features for weight in packed_weights(model))
    lost = largest_loss(model)
    if weights < INT4_ENOUGH and lost > INT4_MOST_LOST:
        raise BackendRefused(
            f"it would change the weights by {100 * lost:.1f} %, and below "
            f"{INT4_ENOUGH / 1e9:g} billion of them {100 * INT4_MOST_LOST:g} % is the most; "
            "int8 changes far less"
        )

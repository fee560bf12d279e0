"""A folder in the transformers format to a causal language model, and facts of its config."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
)
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from transformers_api.checkpoints.headers.text_names import renamed
from transformers_api.engine.load_options import SMALL_BYTES, LoadOptions
from transformers_api.engine.load_progress import uncounted
from transformers_api.engine.model_config import neutral
from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.engine.text_part import causal_model
from transformers_api.engine.weight_report import check_weights, stored_tensors
from transformers_api.errors import ModelLoadFailed, ModelNotServable

log = logging.getLogger(__name__)
disable_progress_bar()  # type: ignore[no-untyped-call]  # a server's log is no terminal
WINDOW_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
CACHE_LAYERS = {
    DynamicLayer: "attention",
    DynamicSlidingWindowLayer: "attention",
    LinearAttentionLayer: "state",
    LinearAttentionAndFullAttentionLayer: "both",
    LinearAttentionAndSlidingWindowAttentionLayer: "both",
    DummyLayer: "none",
}
PLAIN_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer}
ATTENTION_KINDS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "indexed_attention",
}


def pick_device(device: str) -> str:
    """``auto`` is the first accelerator, else the CPU. Raises ModelLoadFailed if absent."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    kind, _, index = device.partition(":")
    if not has.get(kind, kind == "cpu"):
        raise ModelLoadFailed(f"Device '{device}' is not available on this machine", param="device")
    if index and int(index) >= torch.cuda.device_count():
        raise ModelLoadFailed(
            f"Device '{device}': there are {torch.cuda.device_count()} GPUs", param="device"
        )
    return device


def load_model(folder: Path, device: str, dtype: str, trust_remote_code: bool) -> Any:
    """A causal language model in evaluation mode, every weight from the file.

    Raises ModelLoadFailed for a missing, unexpected or mismatched weight: transformers itself
    would fill the gap with random numbers and go on.
    """
    try:
        config = read_config(folder, trust_remote_code)
        if config.is_encoder_decoder:
            raise ModelNotServable("Encoder-decoder models cannot be served", param="model")
        own_code = trust_remote_code and hasattr(config, "auto_map")
        make, config = (AutoModelForCausalLM, config) if own_code else causal_model(config)
        with differentiable(), ShapesOnly(), _without_report():
            loaded: Any = make.from_pretrained(
                folder,
                config=config,
                dtype=dtype_of(dtype, device, config, folder),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be told of them, with their shapes
                key_mapping=_renamed(folder, make, config),
            )
    except ModelLoadFailed:
        raise
    except Exception as error:
        log.exception("Loading %s failed", folder.name)
        raise ModelLoadFailed(f"The model cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    check_weights(info, folder, is_part=make is not AutoModelForCausalLM)
    with differentiable():
        return model.to(device).eval().requires_grad_(False)


def empty_model(folder: Path, dtype: torch.dtype, auto: Any = AutoModelForCausalLM) -> Any:
    """The model of a folder with all parameters on ``meta``, tied ones the same.

    Its buffers have their numbers. ``auto`` is the class of transformers that chooses the model's.
    """
    make, config = auto, read_config(folder, trust_remote_code=False)
    if auto is AutoModelForCausalLM:
        if config.is_encoder_decoder:
            raise ModelNotServable("Encoder-decoder models cannot be served", param="model")
        make, config = causal_model(config)
    for own in (config, config.get_text_config()):
        own.__dict__.pop("quantization_config", None)  # the weights are numbers, once they are here
    new = make.from_config if make is auto else make._from_config
    with no_init_weights(), _parameters_on_meta(), uncounted():
        model = new(config, dtype=dtype)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()  # buffers that are computed, in the precision that they are then
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Transformers lists weights that are not used, such as those of towers; we check them."""
    reports = logging.getLogger("transformers.modeling_utils")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reports.setLevel(level)


def _renamed(folder: Path, make: Any, config: Any) -> dict[str, str] | None:
    """The names in the file of a language part, and the model's own; None: they are the same."""
    if make is AutoModelForCausalLM:
        return None
    with torch.device("meta"), no_init_weights():
        own = make._from_config(config).state_dict()
    return renamed(stored_tensors(folder), own)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def to_meta(_module: Any, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = registration.register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of a folder, without settings that do not matter here."""
    written = json.loads((folder / "config.json").read_bytes())
    config = neutral(written)
    own_code = trust_remote_code and "auto_map" in written
    if config == written or own_code or config.get("model_type") not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    made.name_or_path = str(folder)
    return made


@contextmanager
def differentiable() -> Iterator[None]:
    """Weights made while it lasts can take part in a gradient.

    Those of the engine thread's inference mode never can.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def context_window(model: Any, options: LoadOptions) -> int:
    """Tokens that the model can see: what its config allows, or less where the registry says so."""
    text = model.config.get_text_config(decoder=True)
    sizes = [getattr(text, name, None) for name in WINDOW_FIELDS]
    own = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    tables = [
        _positions(module.position_embeddings)
        for module in model.modules()
        if hasattr(module, "position_embeddings")
    ]
    own = min((size for size in (own, *tables) if size is not None), default=None)
    if own is None:
        return options.max_context_tokens or options.default_context_tokens
    return min(own, options.max_context_tokens or own)


def _positions(table: Any) -> int | None:
    """Tokens of a table of positions that begins behind its padding, as RoBERTa's."""
    if not isinstance(table, torch.nn.Embedding) or table.padding_idx is None:
        return None
    return table.num_embeddings - table.padding_idx - 1


def attention_layers(model: Any) -> int:
    """Layers of the slot cache; 0 for a model whose state is more than K and V per token."""
    if model._is_stateful or not model._supports_default_dynamic_cache():
        return 0
    config = model.config.get_text_config(decoder=True)
    if not hasattr(config, "num_hidden_layers"):  # as BLT's, whose parts have their own
        return 0
    if not set(getattr(config, "layer_types", None) or ()) <= ATTENTION_KINDS:
        return 0
    layers = DynamicCache(config=config).layers
    plain = all(type(layer) in PLAIN_LAYERS for layer in layers)
    return len(layers) if plain else 0


def indexed_layers(model: Any) -> frozenset[int]:
    """The layers with an index of what to attend to."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return frozenset(i for i, kind in enumerate(kinds) if kind == "indexed_attention")


def layer_kinds(model: Any) -> list[tuple[str, int]]:
    """The layers of a StateCache: "attention", "state", "both" or "none", and states of each kind.

    Empty for a model that has layers of another kind, or no states.
    """
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "layer_types", None):
        return []
    layers = DynamicCache(config=config).layers
    kinds = [(CACHE_LAYERS.get(type(layer), ""), _num_states(layer)) for layer in layers]
    has_states = any(kind in ("state", "both") for kind, _ in kinds)
    return kinds if has_states and all(kind for kind, _ in kinds) else []


def _num_states(layer: Any) -> int:
    return getattr(layer, "number_of_states", 0)


def gpu_dtype(stored: str, stored_bytes: int) -> str:
    """Return ``auto`` on CUDA: the file's own, but 16 bits for a float32 file of any size."""
    if stored != "float32" or stored_bytes <= SMALL_BYTES:
        return stored
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def dtype_of(dtype: str, device: str, config: Any, folder: Path) -> Any:
    """The dtype of a model that is loaded with ``dtype``, as ``from_pretrained`` takes it.

    Auto: float32 on a CPU, where tokens then do not depend on the batch; else see ``gpu_dtype``.

    The kernels keep that promise for weights of any dtype: with them it is ``stored``.
    """
    if dtype == "stored":
        return "auto"
    if dtype == "auto":
        if device == "cpu":
            return torch.float32
        stored = str(config.dtype).removeprefix("torch.")
        if not device.startswith("cuda") or stored == "None":
            return "auto"
        dtype = gpu_dtype(stored, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
    return getattr(torch, dtype)


def eos_token_ids(model: Any) -> frozenset[int]:
    """Return the end-of-sequence ids of the generation config and of the config."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(decoder=True)):
        eos = getattr(source, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or ())
    return frozenset(ids)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

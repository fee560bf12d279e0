"""A folder in the transformers format to an encoder, on the kernels where they can run it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from transformers_api.engine.backend import BackendRefused
from transformers_api.engine.embedding import EncoderEngine
from transformers_api.engine.gguf_weights import TABLE, GgufWeights
from transformers_api.engine.load_options import LoadOptions, plain_numbers
from transformers_api.engine.native.encoder import (
    encoder_library,
    encoder_numbers,
    native_facts,
    pack_encoder,
)
from transformers_api.engine.platform.memory import release_memory
from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.engine.pretrained import (
    context_window,
    empty_model,
    pick_device,
    read_config,
)
from transformers_api.engine.rope import follow_lengths
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ModelLoadFailed

log = logging.getLogger(__name__)
PROBE_TOKENS = 13


def load_encoder(
    folder: Path, options: LoadOptions, thread: EngineThread, *, with_head: bool = False
) -> EncoderEngine:
    """An encoder, ready for visits; on the engine thread. Raises ModelLoadFailed.

    Without its head a pooler that the file lacks is not used; ``with_head``: it scores pairs. What
    the kernels refuse is loaded again without them.
    """
    device = pick_device(options.device)
    library = encoder_library(options, device, thread.num_threads)
    config = _config(folder, options)
    stored = str(config.dtype).removeprefix("torch.")
    weights = _gguf_weights(folder)
    if weights is not None:
        stored = plain_numbers(weights.types)
    numbers = encoder_numbers(options.dtype, stored) if library else None
    if library and numbers:
        model = _load(folder, config, getattr(torch, numbers), options, with_head=with_head)
        try:
            pack_encoder(model, library, numbers, _states)
        except BackendRefused as error:
            log.info("%s runs without native kernels: %s", folder.name, error)
            del model
            release_memory()
        else:
            engine = EncoderEngine(model, context_window(model, options), thread, threads=1)
            engine.facts = native_facts(model, library, numbers, engine.facts)
            return engine
    dtype: Any = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.dtype == "auto" and device == "cpu":
        dtype = torch.float32
    model = _load(folder, config, dtype, options, with_head=with_head).to(device)
    return EncoderEngine(model, context_window(model, options), thread)


def _load(folder: Path, config: Any, dtype: Any, options: LoadOptions, *, with_head: bool) -> Any:
    weights = _gguf_weights(folder)
    if weights is not None:
        return _load_stored(folder, weights, dtype)
    auto = AutoModelForSequenceClassification if with_head else AutoModel
    try:
        with ShapesOnly():
            loaded: Any = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise _failure(folder, error) from error
    model, info = loaded
    _check_weights(info, needs_pooler=with_head)
    follow_lengths(model)
    return model.eval()


def _gguf_weights(folder: Path) -> GgufWeights | None:
    return GgufWeights(folder) if (folder / TABLE).is_file() else None


def _load_stored(folder: Path, weights: GgufWeights, dtype: Any) -> Any:
    """The same from a GGUF file. Raises ModelLoadFailed."""
    dtype = weights.dtype if dtype == "auto" else dtype
    try:
        with ShapesOnly():
            model = empty_model(folder, dtype, AutoModel)
        if getattr(model, "pooler", None) is not None:  # of a classifier; GGUF has none
            model.pooler = None
        weights.fill(model, dtype)
    except Exception as error:
        raise _failure(folder, error) from error
    follow_lengths(model)
    return model.eval().requires_grad_(False)


def _config(folder: Path, options: LoadOptions) -> Any:
    try:
        return read_config(folder, options.trust_remote_code)
    except Exception as error:
        raise _failure(folder, error) from error


def _failure(folder: Path, error: Exception) -> ModelLoadFailed:
    log.error("Loading %s failed", folder.name, exc_info=error)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return ModelLoadFailed(f"The model cannot be loaded: {reason}")


def _states(model: Any) -> Tensor:
    """The first output for a short text, with a shorter one beside it where that may be padded."""
    config = model.config.get_text_config()
    rows = 2 if getattr(config, "pad_token_id", None) is not None else 1
    ids = (
        torch.arange(rows * PROBE_TOKENS).view(rows, -1) * 7919 % max(config.vocab_size - 4, 1) + 3
    )
    mask = torch.ones_like(ids)
    mask[1:, PROBE_TOKENS // 2 :] = 0
    output = model(input_ids=ids % config.vocab_size, attention_mask=mask, return_dict=True)
    states: Tensor = output[0]
    return states if states.dim() < 3 else states * mask[:, :, None]


def _check_weights(info: dict[str, Any], *, needs_pooler: bool) -> None:
    lacking = {str(key) for key in info.get("missing_keys") or ()}
    lacking = {key for key in lacking if needs_pooler or "pooler" not in key.split(".")}
    lacking |= {str(key) for key in info.get("mismatched_keys") or ()}
    if lacking:
        raise ModelLoadFailed(
            "The weights do not fit the configuration: missing or of another shape: "
            f"{', '.join(sorted(lacking)[:3])}"
        )

"""The files of a GGUF model's folder besides weights: configurations, tokenizer, template."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
from transformers import GenerationConfig

from transformers_api.checkpoints import gguf_encoder, gguf_tokenizer
from transformers_api.checkpoints.headers.gguf_file import GgufHeader

_HALF = {"F16": "float16", "BF16": "bfloat16"}


def write_texts(header: GgufHeader, config: Any, folder: Path) -> None:
    """Write the files of both configurations and of the tokenizer. Raises ModelLoadFailed."""
    config.dtype = stored_dtype(header)
    generation = end_answers(config, header.metadata)
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    gguf_tokenizer.write(header.metadata, folder)
    if gguf_encoder.is_encoder(header.metadata):
        gguf_encoder.write_modules(header, folder)


def stored_dtype(header: GgufHeader) -> str:
    """The format of the numbers as torch calls it; float32 where some are quantised."""
    types = {gguf.GGMLQuantizationType(tensor.kind).name for tensor in header.tensors}
    halves = [name for name in _HALF if types <= {name, "F32"} and name in types]
    return _HALF[halves[0]] if halves else "float32"


def end_answers(config: Any, metadata: Mapping[str, Any]) -> Any:
    """Put the ids that end an answer into ``config``; the configuration for generation."""
    new_generation_config: Any = GenerationConfig
    ends = _end_tokens(metadata) or config.eos_token_id
    config.eos_token_id = ends
    return new_generation_config(
        bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=config.pad_token_id
    )


def _end_tokens(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """The ids that end an answer: of the text, of a chat turn, of a message."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    ids = list(dict.fromkeys(int(index) for index in named if index is not None))
    return ids[0] if len(ids) == 1 else ids or None


@contextmanager
def alone(source: Path, folder: Path) -> Iterator[Path]:
    """A folder with nothing but the file: those beside it must not leak into the result."""
    origin = folder / "origin"
    origin.mkdir()
    try:
        (origin / source.name).symlink_to(source)
        yield origin
    finally:
        shutil.rmtree(origin)

"""A GGUF file of a Llama's or a Qwen3 mixture's shape with random weights, for real sizes.

    python -m benchmarks.random_gguf 1.1b Q4_0 /tmp/1.1b.gguf --context 32768

Types: Q4_0, Q8_0, or Q4_K_M, whose output layer and half of the down projections are Q6_K. ``moe``
has 64 experts, 8 for a token, 6.9 billion weights. The vocabulary is that of the built-in model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy

from transformers_api.checkpoints.headers.gguf_file import read_gguf_header
from transformers_api.config.settings import Settings
from transformers_api.serving.models import packages
from transformers_api.serving.models.builtin import EMBEDDED

# layers, width, width of the MLP, heads, heads of keys and values
SHAPES = {
    "1.1b": (22, 2048, 5632, 32, 4),
    "3b": (28, 3072, 8192, 24, 8),
    "7b": (32, 4096, 14336, 32, 8),
    "moe": (16, 2048, 1024, 16, 4),
}
EXPERTS = {"moe": (64, 8)}  # of a layer, and for a token
# Where half-precision numbers are in a block, and their size for weights of about 0.02.
HALVES = {
    "Q4_0": {0: 0.0043},
    "Q8_0": {0: 0.00027},
    "Q4_K": {0: 0.00014, 2: 0.001},
    "Q6_K": {208: 1.5e-5},
}
Kind = gguf.GGMLQuantizationType


def write(
    shape: str, kind: str, path: Path, vocabulary: dict[str, Any], context: int = 8192
) -> None:
    """Write the file. ``context``: the tokens of a sequence that its metadata allow."""
    layers, width, inner, heads, key_heads = SHAPES[shape]
    experts, chosen = EXPERTS.get(shape, (0, 0))
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    if experts:
        writer.add_key_length(width // heads)
        writer.add_value_length(width // heads)
        writer.add_expert_count(experts)
        writer.add_expert_used_count(chosen)
        writer.add_expert_feed_forward_length(inner)
    for key, value in vocabulary.items():
        _add(writer, key, value)
    tokens = len(vocabulary["tokenizer.ggml.tokens"])
    draw = numpy.random.default_rng(0)
    keys = key_heads * width // heads
    for name, rows, columns in _matrices(layers, width, inner, keys, tokens):
        own, count = _kind_of(name, kind), experts if experts and ".ffn_" in name else 1
        blocks = _blocks(draw, own, count * rows, columns)
        if count > 1:
            name = name.replace(".weight", "_exps.weight")
            blocks = blocks.reshape(count, rows, -1)
        writer.add_tensor(name, blocks, raw_dtype=Kind[own])
    for name in ("output_norm", *_norms(layers)):
        writer.add_tensor(f"{name}.weight", numpy.ones(width, numpy.float32))
    for layer in range(layers if experts else 0):
        router = draw.normal(0, 0.02, (experts, width)).astype(numpy.float32)
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
        for name in ("attn_q_norm", "attn_k_norm"):
            ones = numpy.ones(width // heads, numpy.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _norms(layers: int) -> Iterator[str]:
    for layer in range(layers):
        yield from (f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm")


def _matrices(
    layers: int, width: int, inner: int, keys: int, tokens: int
) -> Iterator[tuple[str, int, int]]:
    yield "token_embd.weight", tokens, width
    yield "output.weight", tokens, width
    for layer in range(layers):
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", keys, width),
            ("attn_v", keys, width),
            ("attn_output", width, width),
            ("ffn_gate", inner, width),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns


def _kind_of(name: str, kind: str) -> str:
    if kind != "Q4_K_M":
        return kind
    number = name.split(".")[1]
    is_wide = name == "output.weight" or ("ffn_down" in name and int(number) % 2)
    return "Q6_K" if is_wide else "Q4_K"


def _blocks(draw: numpy.random.Generator, kind: str, rows: int, columns: int) -> Any:
    weights, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = draw.integers(0, 256, (rows, columns // weights, size), dtype=numpy.uint8)
    for at, scale in HALVES[kind].items():
        blocks[..., at : at + 2] = numpy.array([scale], numpy.float16).view(numpy.uint8)
    return blocks.reshape(rows, -1)


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType as Value

    of = {bool: Value.BOOL, int: Value.UINT32, float: Value.FLOAT32, str: Value.STRING}
    if isinstance(value, list):
        kind = Value.INT32 if isinstance(value[0], int) else of[type(value[0])]
        writer.add_key_value(key, value, Value.ARRAY, kind)
    else:
        writer.add_key_value(key, value, of[type(value)])


def vocabulary() -> dict[str, Any]:
    """The metadata of the built-in model's tokenizer."""
    located = packages.locate("built-in", EMBEDDED, Settings.from_env().model_store / "packages")
    if located is None:
        raise SystemExit("The built-in model is not installed: make setup")
    _, path = located
    metadata = read_gguf_header(path).metadata
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


def main() -> None:
    """Write a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=("Q4_0", "Q8_0", "Q4_K_M"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a sequence at most")
    options = parser.parse_args()
    write(options.shape, options.type, options.path, vocabulary(), options.context)


if __name__ == "__main__":
    main()

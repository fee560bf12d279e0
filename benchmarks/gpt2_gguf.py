"""A folder with a model of GPT-2's kind as a GGUF file, for peers that read no other.

python -m benchmarks.gpt2_gguf FOLDER FILE
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
PLACE = re.compile(r"(?:transformer\.)?(?:h\.(\d+)\.)?([\w.]+)\.(weight|bias)")
BF16, F32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32


def write(folder: Path, file: Path) -> None:
    """Write ``file``: matrices in bfloat16, the rest in float32."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokens(writer, folder, config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = PLACE.fullmatch(name)
        if found and found[2] in NAMES:
            _add_tensor(writer, found, tensor.float())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: Any, found: re.Match[str], tensor: torch.Tensor) -> None:
    if found[2].startswith(("attn.", "mlp.")) and tensor.ndim == 2:
        tensor = tensor.t()  # GPT-2 keeps (in, out)
    block = f"blk.{found[1]}." if found[1] else ""
    kind = BF16 if tensor.ndim == 2 and found[2] != "wpe" else F32
    data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
    writer.add_tensor(f"{block}{NAMES[found[2]]}.{found[3]}", data, raw_dtype=kind)


def _add_tokens(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    for number in range(len(tokens), config["vocab_size"]):
        tokens.append(f"[PAD{number}]")
        kinds.append(gguf.TokenType.UNUSED)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))

"""The shape of an original checkpoint, from the names and shapes of its weights.

``formats.py`` knows more, with torch; here is what a list of models shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# The number of heads cannot be seen in the weights. What was published:
# (family, width, layers, experts) -> heads
PUBLISHED_HEADS = {
    ("tinygpt", 512, 8, 0): 8,
    ("tinygpt-moe", 512, 8, 4): 8,
    ("tinygpt-moe", 512, 8, 8): 16,  # Wikipedia-MoE
    ("tinygpt2", 768, 12, 0): 12,
    ("tinygpt2", 1024, 12, 0): 16,  # 2.1
    ("gpt3dev", 256, 6, 0): 4,
    ("gpt3dev", 768, 12, 0): 12,
    ("gpt3dev", 1024, 24, 0): 16,
}
WRAPPERS = ("model_state_dict", "model_state", "state_dict", "model")
CONFIGS = ("model_cfg", "config")
# what torch.compile, data parallelism and the Liger kernels add to the names
ADDED = re.compile(r"_orig_mod\.|^module\.|(?<=\.)swiglu\.")
HEAD = "lm_head.weight"  # every family ties it to its embedding
# the token embedding -> (family, position embedding)
_EMBEDDINGS = {
    "token_embedding_table.weight": ("tinygpt", "position_embedding_table.weight"),
    "token_emb.weight": ("tinygpt-moe", "pos_emb.weight"),
    "token_embedding.weight": ("tinygpt2", ""),
    "tok_emb.weight": ("niels", ""),
    "transformer.wte.weight": ("gpt3dev", "transformer.wpe.weight"),
}
_BLOCK = re.compile(r"(?:blocks|transformer\.h)\.(\d+)\.")
_GATE = "blocks.0.moe.gate.weight"
# Fields of the originals' configurations -> TinyGPT's names for them.
_DECLARED = {"T": "block_size", "H": "n_head", "window": "block_size"}
TOP_EXPERTS = 2


def shape_of(
    sizes: Mapping[str, tuple[int, ...]], declared: Mapping[str, Any]
) -> tuple[dict[str, int], int]:
    """(its shape in TinyGPT's words, the number of weights); ``sizes`` by the original's names.

    The shape is empty for weights of no family.
    """
    plain = {ADDED.sub("", name): size for name, size in sizes.items()}
    parameters = sum(math.prod(size) for name, size in plain.items() if name != HEAD)
    embedding = next((name for name in _EMBEDDINGS if len(plain.get(name, ())) == 2), None)
    if embedding is None:
        return {}, parameters
    family, positions = _EMBEDDINGS[embedding]
    vocab, width = plain[embedding]
    layers = len({match[1] for name in plain if (match := _BLOCK.match(name))})
    experts = plain[_GATE][0] if plain.get(_GATE) else 0
    named = {_DECLARED.get(name, name): value for name, value in declared.items()}
    window = plain[positions][0] if plain.get(positions) else named.get("block_size")
    heads = named.get("n_head") or PUBLISHED_HEADS.get((family, width, layers, experts))
    shape = {
        "vocab_size": vocab,
        "block_size": window or (512 if family == "tinygpt2" else None),
        "n_embd": width,
        "n_head": heads,
        "n_layer": layers,
    }
    if experts:
        shape |= {"n_experts": experts, "top_experts": named.get("top_experts", TOP_EXPERTS)}
    return {name: value for name, value in shape.items() if type(value) is int}, parameters

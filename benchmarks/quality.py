"""What narrow weights cost: their distributions of the next token beside those of float32.

    python -m benchmarks.quality
    python -m benchmarks.quality --folder FOLDER --kinds int8 --texts FILE...

Mean KL divergence, how often the likeliest token is the same one, and perplexity, over the tokens
of the texts in benchmarks/texts. ``reordered``: the same model with its channels in another order.
It computes the same, but the weights that share a scale are others than in the file that it was
made of; so a model that comes from a four-bit file tells what int4 does to one that does not.
``cached``: keys and values in int8 (KV_CACHE_DTYPE). The exit status is 1 where a kind misses its
gate.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.machine import default_model_folder, processor
from benchmarks.pages import table, write_block
from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.native.convert_model import (
    largest_loss,
    native_runner,
    packed_bytes,
)
from transformers_api.engine.native.runner import Kind, NativeRunner
from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.engine.pretrained import load_model
from transformers_api.engine.sequence import Sequence
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.replace import layer_groups
from transformers_api.kernels.provider import KernelProvider

TEXTS = Path(__file__).parent / "texts"
MOST_TOKENS = 1024
GATES = {  # mean KL at most, agreement at least
    "int8": (0.01, 0.94),
    "int4": (0.05, 0.0),
    "bfloat16 cached": (0.002, 0.97),
}


@dataclass(frozen=True)
class Found:
    """Of one kind of weights, over all texts."""

    kind: str
    megabytes: float
    loss: float | None
    divergence: float = 0.0
    agreement: float = 1.0
    perplexity: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether it meets its gate."""
        divergence, agreement = GATES.get(self.kind, (math.inf, 0.0))
        return self.divergence <= divergence and self.agreement >= agreement


def reorder(model: Any) -> None:
    """Put the channels of a model of Llama's kind into another order; it computes the same."""
    draw = torch.Generator().manual_seed(0)
    layers, config = model.model.layers, model.config
    stream = torch.randperm(config.hidden_size, generator=draw)
    norms = [
        model.model.norm,
        *(n for x in layers for n in (x.input_layernorm, x.post_attention_layernorm)),
    ]
    for module in (model.model.embed_tokens, *norms):
        module.weight.data = module.weight.data[..., stream].clone()
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.weight.data = model.lm_head.weight.data[:, stream].clone()
    size = config.hidden_size // config.num_attention_heads
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        inside = torch.randperm(config.intermediate_size, generator=draw)
        head = torch.randperm(size, generator=draw)
        values, outputs = (
            (torch.arange(0, n * size, size)[:, None] + head).flatten()
            for n in (config.num_key_value_heads, config.num_attention_heads)
        )
        every = slice(None)
        for module, rows, columns in (
            (attention.q_proj, every, stream),
            (attention.k_proj, every, stream),
            (attention.v_proj, values, stream),
            (attention.o_proj, stream, outputs),
            (mlp.gate_proj, inside, stream),
            (mlp.up_proj, inside, stream),
            (mlp.down_proj, stream, inside),
        ):
            module.weight.data = module.weight.data[rows][:, columns].clone()


def logits_of(runner: NativeRunner, ids: list[int]) -> Tensor:
    """(T, V), as served: through the cache, in one chunk."""
    request = SequenceRequest(ids, SamplingParams(max_tokens=1))
    stream = TokenStream(1, lambda _: None)
    sequence = Sequence(request, stream, 0, eos_token_ids=frozenset(), max_model_len=1 << 30)
    sequence.slot = 0
    runner.cache.reserve(1, len(ids))
    return runner.forward(Batch([sequence], [len(ids)]), len(ids))[0]


def plain_logits(model: Any, ids: list[int]) -> Tensor:
    """(T, V) of the model itself."""
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def compare(
    found: Found, wanted: list[Tensor], given: Callable[[int], Tensor], ids: list[list[int]]
) -> Found:
    """The figures of one kind."""
    tokens, divergence, same, surprisal = 0, 0.0, 0.0, 0.0
    for i, (own, text) in enumerate(zip(wanted, ids, strict=True)):
        p, q = own.log_softmax(-1), given(i).log_softmax(-1)
        tokens += len(text)
        divergence += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        surprisal -= float(q[torch.arange(len(text) - 1), text[1:]].sum())
    return Found(
        found.kind,
        found.megabytes,
        found.loss,
        divergence / tokens,
        same / tokens,
        math.exp(surprisal / (tokens - len(ids))),
    )


def measured(
    folder: Path, name: str, library: Library, ids: list[list[int]], wanted: list[Tensor]
) -> Found:
    """One kind of weights, packed for it alone."""
    kind, _, change = name.partition(" ")
    model = load_model(folder, "cpu", "float32", trust_remote_code=False)
    if change == "reordered":
        reorder(model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    numbers, quantization = (kind, "none") if kind == "bfloat16" else ("bfloat16", kind)
    vocab_size = wanted[0].shape[1]
    two = torch.zeros(1, 2, dtype=torch.int64)
    groups = layer_groups(model, lambda: model(input_ids=two, use_cache=False))
    size = layers, 1, MOST_TOKENS
    kept = Kind(numbers, quantization, has_int8_cache=change == "cached")
    runner = native_runner(model, library, kept, groups, size, vocab_size, NativeRunner.learn)
    loss = largest_loss(model) if kind == "int4" else None
    return compare(
        Found(name, packed_bytes(model) / 1e6, loss),
        wanted,
        lambda i: logits_of(runner, ids[i]),
        ids,
    )


def shown(rows: list[Found]) -> str:
    """Markdown."""
    heads = ["weights", "MB", "lost of the weights", "mean KL", "same top token", "perplexity"]
    lines = []
    for row in rows:
        loss = "" if row.loss is None else f"{100 * row.loss:.2f} %"
        gate = "" if row.kind not in GATES else "held" if row.passes else "missed"
        size, divergence = f"{row.megabytes:.0f}", f"{row.divergence:.4f}"
        agreement, perplexity = f"{100 * row.agreement:.1f} %", f"{row.perplexity:.3f}"
        lines.append([row.kind, size, loss, divergence, agreement, perplexity, gate])
    return table([*heads, "gate"], lines)


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="a model in the transformers format")
    parser.add_argument(
        "--kinds", default="bfloat16,bfloat16 cached,int8,int4,int4 reordered,int8 reordered"
    )
    parser.add_argument("--texts", type=Path, nargs="*", default=sorted(TEXTS.glob("*.txt")))
    parser.add_argument("--isa", default="auto", help="the instruction set: NATIVE_ISA")
    parser.add_argument("--write", type=Path, help="a page to write into")
    options = parser.parse_args()
    folder = options.folder or default_model_folder()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as cache:
        library = KernelProvider(Path(cache), usable_cores(), options.isa).library(wait=True)
        if library is None:
            sys.exit("The native kernels cannot be built here.")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = [tokenizer(path.read_text()).input_ids[:MOST_TOKENS] for path in options.texts]
        model = load_model(folder, "cpu", "float32", trust_remote_code=False)
        wanted = [plain_logits(model, text) for text in ids]
        own = Found("float32", sum(p.nbytes for p in model.parameters()) / 1e6, None)
        rows = [compare(own, wanted, wanted.__getitem__, ids)]
        del model
        for name in options.kinds.split(","):
            rows.append(measured(folder, name, library, ids, wanted))
    text = shown(rows)
    text += f"\n\n{sum(map(len, ids))} tokens of {len(ids)} texts, {folder.name}. {processor()}."
    print(text)
    if options.write:
        write_block(options.write, "quality", text)
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The comparison of a runner with its model, at load, before anybody asks anything."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.runners.model_runner import ModelRunner, Runner
from transformers_api.engine.scheduler import Batch
from transformers_api.engine.sequence import Sequence

log = logging.getLogger(__name__)
# The relative error that rounded weights may make, so far from what wrong ones would (1 and more)
# that no right ones are taken for them; how well they are rounded is asked elsewhere.
QUANTIZED = {"int8": 0.2, "int4": 0.6}


def probe(vocab_size: int, window: int) -> list[list[int]]:
    """Two short sequences, always the same."""
    generator = torch.Generator().manual_seed(0)
    lengths = [n for n in (5, 11) if n + 2 <= window] or [max(window - 2, 1)]
    return [torch.randint(0, vocab_size, (n + 2,), generator=generator).tolist() for n in lengths]


def own_logits(model: Any, vocab_size: int, window: int, *, at_once: bool = False) -> list[Tensor]:
    """The model's own logits (2, V) for the last two tokens of each sequence of the probe.

    ``at_once``: in one pass, for a model that takes a batch; what comes after a sequence is nothing
    to its tokens.
    """
    rows = probe(vocab_size, window)
    longest = max(map(len, rows))
    batches = (
        [[row + [0] * (longest - len(row)) for row in rows]] if at_once else [[r] for r in rows]
    )
    computed = [logits for batch in batches for logits in _plain_logits(model, batch, vocab_size)]
    return [logits[len(row) - 2 : len(row)] for logits, row in zip(computed, rows, strict=True)]


def agrees(
    runner: Runner,
    model: Any,
    vocab_size: int,
    window: int,
    expected: list[Tensor] | None = None,
    quantization: str = "none",
) -> bool:
    """Return True where the runner's logits are the model's own, in company and in chunks.

    Two short sequences, against one forward pass of each without any cache. ``expected``: the
    ``own_logits`` of the model before it was changed.
    """
    rows = probe(vocab_size, window)
    together = isinstance(runner, ModelRunner) and runner.cache.max_rows >= len(rows)
    try:
        if expected is None:
            expected = own_logits(model, vocab_size, window)
        groups = [rows] if together else [[row] for row in rows]
        computed = [
            logits
            for group in groups
            for logits in _run(runner, group, isinstance(runner, ModelRunner))
        ]
        runner.clear()
    except Exception:
        log.info("%s: %s cannot run it", type(model).__name__, type(runner).__name__, exc_info=True)
        return False
    exact = model.dtype == torch.float32 and getattr(runner.cache, "dtype", torch.float32)
    tolerance = QUANTIZED.get(quantization, 1e-3 if exact == torch.float32 else 0.05)
    return all(
        bool((a - b).norm() <= tolerance * b.norm())
        for a, b in zip(computed, expected, strict=True)
    )


def _run(runner: Runner, rows: list[list[int]], in_chunks: bool) -> list[Tensor]:
    """Logits (2, V) of the last two tokens of each row: prefill, then two decode steps."""
    stream = TokenStream(len(rows), lambda _: None)
    sequences = []
    for slot, row in enumerate(rows):
        request = SequenceRequest(row[:-2], SamplingParams(max_tokens=8))
        seq = Sequence(request, stream, slot, eos_token_ids=frozenset(), max_model_len=1 << 30)
        seq.slot = slot
        runner.cache.reserve(slot + 1, len(row))
        widths = [3, len(row) - 5] if in_chunks and len(row) > 5 else [len(row) - 2]
        for width in widths:
            runner.forward(Batch([seq], width))
            seq.num_cached += width
        sequences.append(seq)
    steps = []
    for step in (-2, -1):
        for seq, row in zip(sequences, rows, strict=True):
            seq.tokens.append(row[step])
        steps.append(runner.forward(Batch(sequences, 1))[:, -1].clone())
        for seq in sequences:
            seq.num_cached += 1
    return [torch.stack([step[i] for step in steps]) for i in range(len(rows))]


def _plain_logits(model: Any, batch: list[list[int]], vocab_size: int) -> Tensor:
    inputs = torch.tensor(batch, device=model.device)
    output = model(input_ids=inputs, use_cache=False, return_dict=True)
    logits: Tensor = output.logits[:, :, :vocab_size].float()
    return logits

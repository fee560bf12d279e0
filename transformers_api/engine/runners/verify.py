"""The comparison of a runner with its model, at load, before anybody asks anything."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenStream
from transformers_api.engine.batch import Batch
from transformers_api.engine.not_finite import check_logits
from transformers_api.engine.rope import sequence_length
from transformers_api.engine.runners.model_runner import MaskBuilder, ModelRunner, VerifiedRunner
from transformers_api.engine.sequence import Sequence
from transformers_api.errors import ModelLoadFailed

log = logging.getLogger(__name__)
# The relative error that rounded weights may make, so far from what wrong ones would (1 and more)
# that no right ones are taken for them; how well they are rounded is asked elsewhere.
QUANTIZED = {"int4": 0.6}
AS_STORED = 0.2  # also int8, of weights or of keys and values
RECURRENT = 3  # times that is allowed where states carry rounding on from token to token
SHARED = 3  # tokens that the sequences of the probe begin with
NARROW = 4  # tokens of a window that a short pass reaches
MOST_PROBED = 64  # tokens of a window that the probe itself goes beyond
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "local_attention",
    "keep_window_size",
    "window_size",
    "attention_chunk_size",
)


def probe(
    model: Any, vocab_size: int, window: int, *, in_windows: bool, seed: int = 0
) -> list[list[int]]:
    """Two short sequences that begin alike, always the same for a ``seed``.

    Unless they have to stay ``in_windows``, the longer one goes beyond those that are small.
    """
    generator = torch.Generator().manual_seed(seed)
    small = [w for w in _windows(model).values() if w <= MOST_PROBED]
    longer = 11 if in_windows or not small else max(11, max(small) + 3)
    lengths = [n for n in (5, longer) if n + 2 <= window] or [max(window - 2, 1)]
    rows = [torch.randint(0, vocab_size, (n + 2,), generator=generator).tolist() for n in lengths]
    rows[-1][:SHARED] = rows[0][:SHARED]
    return rows


def own_logits(
    model: Any, vocab_size: int, rows: list[list[int]], *, at_once: bool = False
) -> list[Tensor]:
    """The model's own logits (2, V) for the last two tokens of each of ``rows``.

    ``at_once``: in one pass, for a model that takes a batch; what comes after a sequence is nothing
    to its tokens.
    """
    longest = max(map(len, rows))
    batches = (
        [[row + [0] * (longest - len(row)) for row in rows]] if at_once else [[r] for r in rows]
    )
    computed = [logits for batch in batches for logits in _plain_logits(model, batch, vocab_size)]
    return [logits[len(row) - 2 : len(row)] for logits, row in zip(computed, rows, strict=True)]


def expected_logits(runner: VerifiedRunner, vocab_size: int, window: int) -> list[Tensor]:
    """The logits that a runner has to give: its model's own, of the probe."""
    model, original = runner.model, runner.original_window
    rows = _rows(runner, vocab_size, window)
    expected = own_logits(model, vocab_size, rows)
    if original is not None:  # the last one is read as a long sequence
        with sequence_length(original + 1):
            expected[-1:] = own_logits(model, vocab_size, rows[-1:])
    return expected


def _rows(runner: VerifiedRunner, vocab_size: int, window: int, seed: int = 0) -> list[list[int]]:
    """The probe. One at a time is generate()'s own way, whose cache may forget what lies far."""
    in_windows = not isinstance(runner, ModelRunner)
    return probe(runner.model, vocab_size, window, in_windows=in_windows, seed=seed)


def windows_agree(model: Any) -> bool:
    """True where the masks that a runner makes are those of the model, windows included.

    Without a window there is nothing to ask. A wide one would need a long pass; so all are made
    narrow for as long as it takes, in the configuration that the model and the masks both read.
    """
    config = model.config.get_text_config(decoder=True)
    windows = _windows(model)
    if not windows:
        return True
    positions = torch.arange(2 * NARROW, device=model.device)[None]
    ids = positions % min(config.vocab_size, 2 * NARROW)
    try:
        for name in windows:
            setattr(config, name, NARROW)
        mask = MaskBuilder(model).build(positions, positions.shape[1])
        own = model(input_ids=ids, use_cache=False, return_dict=True).logits
        masked = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            return_dict=True,
        ).logits
    except Exception:
        log.info("%s: its windows cannot be asked", type(model).__name__, exc_info=True)
        return False
    finally:
        for name, tokens in windows.items():
            setattr(config, name, tokens)
    return bool((own - masked).norm() <= _tolerance(model.dtype) * own.norm())


def looks_ahead(model: Any, vocab_size: int, window: int) -> str:
    """Return the reason, for an error, where a model's tokens depend on later ones; else "".

    Those of a model that reads a text in both directions do. Raises ModelLoadFailed where its
    logits are not finite.
    """
    (*_, row) = probe(model, vocab_size, window, in_windows=True)
    try:
        whole, part = (_plain_logits(model, [ids], vocab_size)[0, 0] for ids in (row, row[:-2]))
        check_logits([whole, part])
    except ModelLoadFailed:
        raise
    except Exception:  # of the model's own code
        name = type(model).__name__
        log.warning("%s: whether it looks ahead was not found out", name, exc_info=True)
        return ""
    if (whole - part).norm() <= _tolerance(model.dtype) * part.norm():
        return ""
    hint = ' (config.json has no "is_decoder": true)' if not _is_decoder(model) else ""
    return f": what it says of a token depends on later tokens{hint}"


def _is_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_decoder", True))


def _windows(model: Any) -> dict[str, int]:
    """The windows of a configuration, in tokens, by their names."""
    config = model.config.get_text_config(decoder=True)
    values = {name: getattr(config, name, None) for name in WINDOWS}
    return {name: v for name, v in values.items() if isinstance(v, int) and v > NARROW}


def agrees(
    runner: VerifiedRunner,
    model: Any,
    vocab_size: int,
    window: int,
    expected: list[Tensor] | None = None,
    quantization: str = "none",
    seed: int = 0,
) -> bool:
    """Return True where the runner's logits are the model's own, in company and in chunks.

    Two short sequences, against one forward pass of each without any cache. ``expected``: the
    ``own_logits`` of the model before it was changed. ``seed``: see ``probe``.
    """
    rows = _rows(runner, vocab_size, window, seed)
    together = isinstance(runner, ModelRunner) and runner.cache.max_rows >= len(rows)
    try:
        if expected is None:
            expected = expected_logits(runner, vocab_size, window)
        groups = [rows] if together else [[row] for row in rows]
        computed = [logits for group in groups for logits in _run(runner, group)]
        runner.clear()
    except Exception:
        log.info("%s: %s cannot run it", type(model).__name__, type(runner).__name__, exc_info=True)
        return False
    rounded = getattr(runner.cache, "dtype", None) or model.dtype  # a cache may have its own
    coarser = rounded if model.dtype == torch.float32 else model.dtype
    tolerance = QUANTIZED.get(quantization, AS_STORED)
    if quantization == "none" and not getattr(runner.cache, "holds_codes", False):
        tolerance = _tolerance(coarser)
    if together and not runner.cache.in_pieces:
        tolerance *= RECURRENT
    return all(
        bool((a - b).norm() <= tolerance * b.norm())
        for a, b in zip(computed, expected, strict=True)
    )


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype == torch.float32 else 0.05


def _run(runner: VerifiedRunner, rows: list[list[int]]) -> list[Tensor]:
    """Logits (2, V) of the last two tokens of each row: prefill, then two decode steps.

    In chunks, where the runner takes them. The first tokens of the last row are copied from the
    first one's, unless a rope with two kinds of factors has to show the other kind.
    """
    stream = TokenStream(len(rows), lambda _: None)
    in_chunks = isinstance(runner, ModelRunner) and runner.cache.in_pieces
    sequences: list[Sequence] = []
    for slot, row in enumerate(rows):
        seq = _sequence(row[:-2], stream, slot)
        if runner.original_window is not None and slot == len(rows) - 1:
            seq.original_window = 0
        elif runner.original_window is not None:
            seq.original_window = len(row)
        runner.cache.reserve(slot + 1, len(row))
        widths = [SHARED, len(row) - 2 - SHARED] if in_chunks and len(row) > 5 else [len(row) - 2]
        if slot and len(widths) > 1 and runner.original_window is None:
            runner.cache.copy(0, slot, SHARED)
            seq.num_cached = widths.pop(0)
        for width in widths:
            runner.forward(Batch([seq], [width]))
            seq.num_cached += width
        sequences.append(seq)
    steps = []
    for step in (-2, -1):
        for seq, row in zip(sequences, rows, strict=True):
            seq.tokens.append(row[step])
        parts = Batch(sequences, [1] * len(sequences)).parts
        steps.append(torch.cat([runner.forward(part)[:, -1].clone() for part in parts]))
        for seq in sequences:
            seq.num_cached += 1
    return [torch.stack([step[i] for step in steps]) for i in range(len(rows))]


def _sequence(prompt: list[int], stream: TokenStream, slot: int) -> Sequence:
    request = SequenceRequest(prompt, SamplingParams(max_tokens=8))
    seq = Sequence(request, stream, slot, eos_token_ids=frozenset(), max_model_len=1 << 30)
    seq.slot = slot
    return seq


def _plain_logits(model: Any, batch: list[list[int]], vocab_size: int) -> Tensor:
    inputs = torch.tensor(batch, device=model.device)
    output = model(input_ids=inputs, use_cache=False, return_dict=True)
    logits: Tensor = output.logits[:, :, :vocab_size].float()
    return logits

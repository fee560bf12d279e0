"""Decode steps on a GPU: captured once for each size, then one launch instead of hundreds.

A graph is bound to addresses and shapes. So a step is padded to a bucket, of rows and of cached
tokens, and its inputs are written where the graph reads them. Rows that only pad write their keys
and values into a row of the cache that nobody reads.

A step that is watched is the very same padded step, run uncaptured: same shapes, so the same bits.
Whole streams agree in tokens, and in scores to rounding, as all that torch computes: prompts that
are read in other chunks are products of other shapes (docs/decisions/0004-float32-on-cpu.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.engine.kv_cache import MIN_LENGTH, SlotCache, power_of_two
from transformers_api.engine.runners.adapted_modules import adapted
from transformers_api.engine.runners.edited_attention import current_attention_edits
from transformers_api.engine.runners.edited_modules import current_edits
from transformers_api.engine.runners.model_runner import ModelRunner

log = logging.getLogger(__name__)
Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]  # a step to what repeats it, with the same memory


class PaddedCache(SlotCache):
    """A SlotCache whose steps may have more rows than sequences."""

    spare = 1  # for the padding

    def room_for(self, rows: int) -> int:
        """No more, as what padding wrote into the spare one would be another's first keys."""
        return rows

    def bind_padded(self, row_index: Tensor, positions: Tensor, context: int) -> None:
        """Aim the next forward at rows 0..R, each writing its token into row ``row_index`` (R, 1).

        ``positions`` (R, 1); ``context``: how many tokens of each row are read, masked or not.
        """
        self.window = slice(0, len(positions))
        self.context = context
        self.span = None
        self.row_index, self.positions = row_index, positions

    @property
    def addresses(self) -> list[int]:
        """The addresses of keys and values now."""
        return [rows.data_ptr() for layer in self.slots for rows in layer.rows]


class GraphRunner(ModelRunner):
    """A ModelRunner that captures its decode steps. ``capture``: how; by default as CUDA graphs."""

    cache: PaddedCache

    def __init__(
        self, model: Any, cache: PaddedCache, vocab_size: int, capture: Capture | None = None
    ) -> None:
        super().__init__(model, cache, vocab_size)
        self._capture = capture or cuda_graphs()
        self._captured: dict[tuple[int, int], Step] = {}
        self._addresses: list[int] = []
        # ids, positions and rows of the cache, as the captured steps read them
        self._inputs = torch.zeros(3, cache.max_rows, 1, dtype=torch.long, device=self.device)

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        if batch.width > 1 or keep > 1 or batch.first_slot or not self.cache.addresses:
            return super().forward(batch, keep)
        sequences, cache = batch.sequences, self.cache
        count = len(sequences)
        context = max(seq.num_cached for seq in sequences) + 1
        rows = min(power_of_two(count), cache.rows)
        length = min(max(power_of_two(context), MIN_LENGTH), cache.length)
        self._write(batch, rows)

        def step() -> Tensor:
            return self._padded_step(rows, length)

        # whoever watches has hooks in the model, which a graph would not call: the same, uncaptured
        if batch.is_adapted:
            with adapted(self.model, batch.adapters, padding=rows - count):
                return step()[:count]
        edited = current_edits() or current_attention_edits()
        watched = edited or any(seq.observe for seq in sequences)
        run = step if watched else self._repeating(rows, length, step)
        return run()[:count]

    @property
    def num_captured(self) -> int:
        """Sizes that are repeated now."""
        return len(self._captured)

    def clear(self) -> None:
        """See Runner."""
        self._captured.clear()
        super().clear()

    def _write(self, batch: Batch, rows: int) -> None:
        padding = rows - len(batch.sequences)
        inputs = [
            [seq.upcoming(1)[0] for seq in batch.sequences] + [0] * padding,
            [seq.num_cached for seq in batch.sequences] + [0] * padding,
            [*range(len(batch.sequences))] + [self.cache.rows] * padding,
        ]
        self._inputs[:, :rows, 0] = torch.tensor(inputs).to(self.device)

    def _repeating(self, rows: int, length: int, step: Step) -> Step:
        if self.cache.addresses != self._addresses:
            self._captured.clear()
            self._addresses = self.cache.addresses
        if (rows, length) not in self._captured:
            log.debug("Capturing a step of %d rows and %d cached tokens", rows, length)
            self._captured[rows, length] = self._capture(step)
        return self._captured[rows, length]

    def _padded_step(self, rows: int, length: int) -> Tensor:
        """Logits (R, 1, V) of all rows, padding included."""
        ids, positions, row_index = self._inputs[:, :rows]
        self.cache.bind_padded(row_index, positions, length)
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self.masks.build(positions, length),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        logits: Tensor = output.logits[:, -1:, : self.vocab_size].float()
        return logits


def cuda_graphs() -> Capture:
    """Captures steps as CUDA graphs that share their memory: a result lasts until the next step."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate on first use, which must not be noted
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return capture

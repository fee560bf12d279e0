"""A runner that gives the model's own logits: by the plans on the disk, or by recording passes."""

from __future__ import annotations

import logging
from itertools import chain
from operator import methodcaller
from typing import Any

from torch import Tensor

from transformers_api.engine.backend import BackendRefused, PlanOutdated
from transformers_api.engine.native.convert_model import check_loss, native_runner
from transformers_api.engine.native.plan_cache import PlanFile
from transformers_api.engine.native.runner import Kind, NativeRunner
from transformers_api.engine.not_finite import check_logits
from transformers_api.engine.rope import sequence_length
from transformers_api.engine.runners.verify import agrees, own_logits, probe, windows_agree
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.experts import expert_layers
from transformers_api.kernels.modules.replace import Place, layer_groups
from transformers_api.kernels.modules.weight_memory import WeightMemory

Size = tuple[list[tuple[str, int]] | int, int, int]
log = logging.getLogger(__name__)
# Rounding may let a token choose another expert, and then it says something else for a good reason.
# Whatever is recorded wrongly is wrong in every probe, so one that agrees is enough.
ROUTED_PROBES = 8


def verified_runner(
    model: Any,
    library: Library,
    kind: Kind,
    size: Size,
    vocab_size: int,
    file: PlanFile | None,
    original_window: int | None = None,
    memory: WeightMemory | None = None,
) -> NativeRunner:
    """Return a runner for a loaded model, whose weights are packed by this.

    ``size``: see ``native_runner``. ``file``: where the plans of an earlier load are, or where
    those of this one are to be stored. ``original_window``: see ``ModelRunner``. ``memory``: see
    ``native_runner``. Raises BackendRefused, PlanOutdated.
    """
    if file is not None and (plans := file.read()) is not None:
        try:
            groups = plans.groups(model)
            how = size, vocab_size, plans.teach, original_window, memory
            return native_runner(model, library, kind, groups, *how)
        except PlanOutdated:
            file.remove()
            raise
    if not windows_agree(model):
        raise BackendRefused("its windows are not those of its configuration")
    try:
        groups, expected = _ask_model(model, vocab_size, size, original_window)
    except Exception as error:  # of the model's own code, such as one that looks into its layers
        log.info("%s cannot be asked", type(model).__name__, exc_info=True)
        raise BackendRefused(f"it cannot be asked for its own logits: {error}") from error
    check_logits(chain.from_iterable(expected))
    memory = memory or WeightMemory()
    with memory.packing_later(library) as until_packed:
        learn = methodcaller("learn", until_packed)
        rest = size, vocab_size, learn, original_window, memory
        runner = native_runner(model, library, kind, groups, *rest)
    check_loss(model, kind.quantization)
    if not any(
        agrees(runner, model, vocab_size, size[2], logits, kind.quantization, seed)
        for seed, logits in enumerate(expected)
    ):
        raise BackendRefused("it says something else with them")
    if file is not None:
        file.write(runner, groups)
    return runner


def _ask_model(
    model: Any, vocab_size: int, size: Size, original_window: int | None
) -> tuple[list[list[Place]], list[list[Tensor]]]:
    """The layers in the order of their calls, and the model's own logits for each probe."""
    probes = range(ROUTED_PROBES if any(expert_layers(model)) else 1)
    questions = [probe(model, vocab_size, size[2], in_windows=False, seed=seed) for seed in probes]
    expected: list[list[Tensor]] = []

    def ask(rows: list[list[int]]) -> None:
        expected.append(own_logits(model, vocab_size, rows, at_once=True))

    groups = layer_groups(
        model, lambda: ask(questions[0]), only_called=not isinstance(size[0], int)
    )
    for rows in questions[1:]:
        ask(rows)
    if original_window is not None:  # the last ones are read as long sequences
        with sequence_length(original_window + 1):
            for logits, rows in zip(expected, questions, strict=True):
                logits[-1:] = own_logits(model, vocab_size, rows[-1:])
    return groups, expected

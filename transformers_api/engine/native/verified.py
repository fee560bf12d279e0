"""A runner that gives the model's own logits: by what an earlier load found out, or by looking."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformers_api.engine.native.convert_model import (
    Kind,
    NativeRefused,
    PlanOutdated,
    check_loss,
    native_runner,
)
from transformers_api.engine.native.plan_cache import PlanFile
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.runners.verify import agrees, own_logits
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.replace import layer_groups


def checked_runner(
    model: Any,
    library: Library,
    kind: Kind,
    size: tuple[int, int, int],
    vocab_size: int,
    file: PlanFile | None,
) -> NativeRunner:
    """A runner for a loaded model, which is packed by this. ``size``: see ``native_runner``.

    ``file``: where is what an earlier load found out, or where it is to be kept. Raises
    NativeRefused, PlanOutdated.
    """
    if file is not None and (known := file.read()) is not None:
        try:
            groups = known.groups(model)
            return native_runner(model, library, kind, groups, size, vocab_size, known.teach)
        except PlanOutdated:
            file.remove()
            raise
    window = size[2]
    wanted: list[Tensor] = []
    groups = layer_groups(
        model, lambda: wanted.extend(own_logits(model, vocab_size, window, at_once=True))
    )
    learn = NativeRunner.learn
    runner = native_runner(model, library, kind, groups, size, vocab_size, learn)
    check_loss(model)
    if not agrees(runner, model, vocab_size, window, wanted, kind.quantization):
        raise NativeRefused("it says something else with them")
    if file is not None:
        file.write(runner, groups)
    return runner

"""Native models on standby: all that there is of an unloaded model but its weights.

Most of a load finds out what would be the same the next time: the modules, the operations of a
pass, its plan, the proof that the plan is right. A model on standby has all this and gives its
packed weights and its KV cache back. To wake it up its weights are read and packed again, and its
logits have to be those of before, bit by bit.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformers_api.engine.native.convert_model import packed_weights
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.native.state_runner import NativeStateRunner
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.kernels.modules.experts import PackedExperts
from transformers_api.kernels.modules.linear import (
    NativeEmbedding,
    NativeLinear,
    PackedWeight,
    WeightMemory,
)

LARGEST_REST = 64 << 20  # bytes of what is not packed, such as norms, that may be kept of a model
PROBE = (1, 2, 3)  # tokens that exist everywhere


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor in the files, and its conversion before it was packed."""

    name: str
    dtype: torch.dtype
    is_transposed: bool

    def of(self, stored: Tensor) -> Tensor:
        """(out, in)."""
        made = stored.to(self.dtype)
        return made.t() if self.is_transposed else made


class NativeStandby:
    """Meets StandbyModel."""

    def __init__(
        self, runner: NativeRunner, folder: Path, origins: list[tuple[PackedWeight, list[Origin]]]
    ) -> None:
        self.runner = runner
        self._folder = folder
        self._origins = origins
        self._logits = runner.logits_of(PROBE)

    @classmethod
    def of(cls, runner: Runner, folder: Path) -> NativeStandby | None:
        """Return None where much is not packed, or where the files have other names."""
        if not isinstance(runner, NativeRunner) or isinstance(runner, NativeStateRunner):
            return None
        model = runner.model
        rest = [*model.parameters(), *model.buffers()]
        if sum(tensor.nbytes for tensor in rest) > LARGEST_REST:
            return None
        weights = packed_weights(model)
        plain = [weight for weight in weights if isinstance(weight, PackedWeight)]
        if len(plain) == len(weights) and all(weight.sources for weight in plain):
            return cls(runner, folder, [(weight, []) for weight in plain])
        try:
            with ExitStack() as stack:
                names = set(_stored(folder, stack))
        except (OSError, SafetensorError):  # a file beside the model's own
            return None
        origins = _origins(model, names)
        parts = []
        for weight in weights:
            if isinstance(weight, PackedExperts) or id(weight) not in origins:
                return None  # experts are in the files one by one, each under a name of its own
            parts.append((weight, origins[id(weight)]))
        return cls(runner, folder, parts)

    def sleep(self) -> None:
        """See StandbyModel."""
        self.runner.release()
        for weight, _ in self._origins:
            weight.release()

    def wake(self) -> str | None:
        """See StandbyModel."""
        try:
            self._fill()
        except (KeyError, OSError, SafetensorError, ValueError) as error:
            return str(error)
        self.runner.cache = self.runner.cache.anew()
        is_same = torch.equal(self.runner.logits_of(PROBE), self._logits)
        return None if is_same else "it says something else"

    def _fill(self) -> None:
        memory = WeightMemory()
        with ExitStack() as stack:
            stored = _stored(self._folder, stack)
            for weight, origins in self._origins:
                if weight.sources:
                    weight.fill([source.matrix() for source in weight.sources], memory)
                    for source in weight.sources:
                        source.release()
                    continue
                weight.fill([o.of(stored[o.name].get_tensor(o.name)) for o in origins], memory)


def _stored(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The opened file of each tensor."""
    files = [stack.enter_context(safe_open(p, "pt")) for p in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.offset_keys()}


def _origins(model: Any, names: set[str]) -> dict[int, list[Origin]]:
    """Origins by the weight's id, where the files have all of its parts."""
    origins: dict[int, dict[int, Origin]] = defaultdict(dict)
    parts: dict[int, int] = {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for path, module in model.named_modules():
        if isinstance(module, NativeLinear):
            weight, index, is_transposed = module.joined.weight, module.index, module.is_transposed
            parts[id(weight)] = len(module.joined.sizes)
        elif isinstance(module, NativeEmbedding):
            weight, index, is_transposed = module.packed, 0, False
        else:
            continue
        own = f"{path}.weight"
        below = own.removeprefix(f"{model.base_model_prefix}.")  # saved without the head
        for name in (own, below, tied.get(own)):
            if name in names:
                origins[id(weight)][index] = Origin(name, module.weight.dtype, is_transposed)
    return {
        weight: [origins[weight][index] for index in range(count)]
        for weight, count in parts.items()
        if len(origins[weight]) == count
    }

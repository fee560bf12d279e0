"""Models that were unloaded and may be wanted again: all that there is of them but their weights.

Most of a load finds out what would be the same the next time: the modules, what a pass does, the
plan that is made of it, whether that plan is right. A model that sleeps keeps this and gives its
packed weights and its KV cache back. To wake it up its weights are read and packed again, and it
is asked for logits, which have to be those of before, bit by bit.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformers_api.engine.native.convert_model import packed_weights
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.kernels.modules.linear import (
    NativeEmbedding,
    NativeLinear,
    PackedWeight,
    WeightMemory,
)

log = logging.getLogger(__name__)
LARGEST_REST = 64 << 20  # bytes of what is not packed, such as norms, that may be kept of a model
SAID = (1, 2, 3)  # tokens that exist everywhere


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor in the files, and what became of it before it was packed."""

    name: str
    dtype: torch.dtype
    is_transposed: bool

    def of(self, stored: Tensor) -> Tensor:
        """(out, in)."""
        made = stored.to(self.dtype)
        return made.t() if self.is_transposed else made


class Sleeper:
    """A runner, with its model, that can be put to sleep and woken up."""

    def __init__(
        self, runner: NativeRunner, folder: Path, origins: list[tuple[PackedWeight, list[Origin]]]
    ) -> None:
        self.runner = runner
        self._folder = folder
        self._origins = origins
        self._said = runner.say(SAID)

    @classmethod
    def of(cls, runner: Runner, folder: Path) -> Sleeper | None:
        """None if it is not packed, if much of it is not, or if the files have other names."""
        if not isinstance(runner, NativeRunner):
            return None
        model = runner.model
        rest = [*model.parameters(), *model.buffers()]
        if sum(tensor.nbytes for tensor in rest) > LARGEST_REST:
            return None
        try:
            with ExitStack() as stack:
                names = set(_stored(folder, stack))
        except (OSError, SafetensorError):  # a file beside the model's own
            return None
        found = _origins(model, names)
        weights = packed_weights(model)
        if any(id(weight) not in found for weight in weights):
            return None
        return cls(runner, folder, [(weight, found[id(weight)]) for weight in weights])

    def sleep(self) -> None:
        """Give the memory back."""
        self.runner.rest()
        for weight, _ in self._origins:
            weight.release()

    def wake(self) -> bool:
        """Read the weights. False if it is not what it was: it may not be used then."""
        memory = WeightMemory()
        with ExitStack() as stack:
            stored = _stored(self._folder, stack)
            for weight, origins in self._origins:
                weight.fill([o.of(stored[o.name].get_tensor(o.name)) for o in origins], memory)
        self.runner.cache = self.runner.cache.anew()
        return torch.equal(self.runner.say(SAID), self._said)


class SleepingModels:
    """The ``most`` models that were unloaded last, by all that a load of theirs depends on."""

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._sleepers: OrderedDict[Hashable, Sleeper] = OrderedDict()

    def keep(self, key: Hashable, sleeper: Sleeper) -> None:
        """Put it to sleep."""
        sleeper.sleep()
        self._sleepers[key] = sleeper
        self._sleepers.move_to_end(key)
        while len(self._sleepers) > self._most:
            self._sleepers.popitem(last=False)

    def wake(self, key: Hashable) -> Sleeper | None:
        """That model, awake; None if it does not sleep here, or does not wake up."""
        sleeper = self._sleepers.pop(key, None)
        if sleeper is None:
            return None
        try:
            if sleeper.wake():
                return sleeper
            reason = "it says something else"
        except (KeyError, OSError, SafetensorError, ValueError) as error:
            reason = str(error)
        log.warning("A model is loaded anew, as it was not the same again: %s", reason)
        sleeper.sleep()
        return None


def _stored(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The opened file of each tensor."""
    files = [stack.enter_context(safe_open(p, "pt")) for p in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.offset_keys()}


def _origins(model: Any, names: set[str]) -> dict[int, list[Origin]]:
    """By the weight's id, where all of its parts were found."""
    found: dict[int, dict[int, Origin]] = defaultdict(dict)
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
                found[id(weight)][index] = Origin(name, module.weight.dtype, is_transposed)
    return {
        weight: [found[weight][index] for index in range(count)]
        for weight, count in parts.items()
        if len(found[weight]) == count
    }

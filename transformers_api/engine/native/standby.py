"""Native models on standby: all that there is of an unloaded model but its weights.

Most of a load finds out what would be the same the next time: the modules, the operations of a
pass, its plan, the proof that the plan is right. A model on standby has all this and gives its
packed weights and its KV cache back. To wake it up its weights are read and packed again, and its
logits have to be those of before, bit by bit.
"""

from __future__ import annotations

import torch

from transformers_api.engine.native.convert_model import packed_weights
from transformers_api.engine.native.runner import PROBE, NativeRunner
from transformers_api.engine.native.state_runner import NativeStateRunner
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import OtherWeights, WeightMemory

LARGEST_REST = 64 << 20  # bytes of what is not packed, such as norms, that may be kept of a model


class NativeStandby:
    """Meets StandbyModel."""

    def __init__(self, runner: NativeRunner, weights: list[PackedWeight]) -> None:
        self.runner = runner
        self._weights = weights
        logits = runner.probe_logits  # which do not depend on what else was asked for with them
        self._logits = runner.logits_of(PROBE) if logits is None else logits

    @classmethod
    def of(cls, runner: Runner) -> NativeStandby | None:
        """Return None where much is not packed, or where what is packed cannot be read again.

        Experts cannot, and weights that transformers has read.
        """
        if not isinstance(runner, NativeRunner) or isinstance(runner, NativeStateRunner):
            return None
        model = runner.model
        rest = [*model.parameters(), *model.buffers()]
        if sum(tensor.nbytes for tensor in rest) > LARGEST_REST:
            return None
        weights = packed_weights(model)
        plain = [weight for weight in weights if isinstance(weight, PackedWeight)]
        is_whole = len(plain) == len(weights) and all(weight.sources for weight in plain)
        return cls(runner, plain) if is_whole else None

    def sleep(self) -> None:
        """See StandbyModel."""
        self.runner.release()
        for weight in self._weights:
            weight.release()

    def wake(self) -> str | None:
        """See StandbyModel."""
        try:
            self._fill()
        except (OSError, ValueError, OtherWeights) as error:
            return str(error)
        self.runner.cache = self.runner.cache.anew()
        is_same = torch.equal(self.runner.logits_of(PROBE), self._logits)
        return None if is_same else "it says something else"

    def _fill(self) -> None:
        packed, library = self.runner.packed, self.runner.cache.library
        memory = packed.memory(library) if packed else WeightMemory()
        for weight in self._weights:
            weight.fill([source.matrix() for source in weight.sources], memory)
            for source in weight.sources:
                source.release()
        self.runner.model.stored_weights.close()
        if packed and not memory.is_stored:
            packed.write_later(library, self._weights)

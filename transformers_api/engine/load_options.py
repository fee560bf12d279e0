"""Options of one load: what settings and registry say about it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_api.engine.base import EngineListener
from transformers_api.engine.standby import StandbyModels

if TYPE_CHECKING:
    from transformers_api.engine.native.packed_weights import PackedFile

SMALL_BYTES = 64 << 20  # a float32 checkpoint up to here stays exact: it has no weight to speak of
# Weights of a GGUF file up to which "auto" makes plain numbers of them: so small a model notices
# the rounding of its inputs, and takes little memory anyway.
AS_NUMBERS = 300_000_000
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plain_numbers(types: Mapping[str, int]) -> str:
    """The format of a GGUF file's weights as plain numbers: of a small one's all are exact.

    ``types``: weights by ggml's name of their type.
    """
    is_small = sum(types.values()) < AS_NUMBERS
    return "float32" if is_small or types.keys() == {"F32"} else "bfloat16"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of a load. Those that are compared decide what a loaded model is."""

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    max_context_tokens: int | None = None  # the registry's: clamps
    default_context_tokens: int = 2048  # where the config says nothing
    eos_token_ids: frozenset[int] = frozenset()  # the tokenizer's, besides the model's own
    tokenizer_size: int | None = None  # largest id + 1; larger ids are never sampled
    stamp: Hashable = None  # another one when the files are
    num_slots: int = 32
    max_waiting: int = 128
    prefill_chunk: int = 256
    prefill_alone: int = 0  # tokens of a prompt that is alone, where that is more
    prompt_lookup_tokens: int = 0  # used where bits do not depend on how many tokens are read
    kv_cache_bytes: int | None = None  # None: a quarter of what is free after loading
    adapter_bytes: int = 1 << 29  # of adapters in memory
    # int8: keys and values on the kernels, which a load waits for; auto: of the model's numbers.
    kv_cache_dtype: str = "auto"
    native: Path | None = None  # cache of the compiled kernels; None: without them
    native_isa: str = "auto"  # the instruction set that they are compiled for
    plans: Path | None = None  # cache of execution plans; None: none
    # int8, int4: only with the kernels, else the load fails. gguf: as a GGUF file has them; where
    # there is none, or none that is quantised: none. auto: gguf, but none for small models.
    quantization: str = "none"
    # Hears of every step.
    listener: EngineListener | None = field(default=None, compare=False)
    # Raises InsufficientMemory where so many bytes of weights do not fit.
    check_room: Callable[[int], None] | None = field(default=None, compare=False)
    # Where the packed weights of this model are stored, or are to be; None: nowhere.
    packed: PackedFile | None = field(default=None, compare=False)
    # Where unloaded models go.
    standby: StandbyModels = field(default_factory=StandbyModels, compare=False)

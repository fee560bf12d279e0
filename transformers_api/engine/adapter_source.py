"""Plain data of adapters (LoRA), for the rest of the program. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """The addition to one layer: ``scale`` times ``up`` (out, rank) times ``down``."""

    path: str  # of the layer in the model, or ggml's name of it
    down: str  # name of a tensor (rank, in)
    up: str
    scale: float
    magnitude: str | None = None  # DoRA: name of the lengths (out) that the weight's rows get


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter that lies complete and checked on the disk."""

    name: str
    weights: Path  # safetensors, or GGUF
    layers: tuple[AdapterLayer, ...]
    bytes: int  # of its numbers as float32
    stamp: Hashable = None  # another one when a file has changed
    architecture: str | None = None  # of a GGUF file, by ggml's name

    @property
    def key(self) -> Hashable:
        """The same for the same numbers."""
        return self.name, self.weights, self.stamp


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """An adapter in memory."""

    name: str
    bytes: int
    users: int  # requests that hold it

"""From the hidden states of a text to its vector: pooling, layers behind it, length one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from transformers_api.engine.not_finite import checked
from transformers_api.errors import ModelLoadFailed

Mode = Literal["cls", "mean", "last", "max", "mean_sqrt_len_tokens", "weightedmean"]
_SUMS = {"mean", "mean_sqrt_len_tokens", "weightedmean"}


@dataclass(frozen=True, slots=True)
class Reduction:
    """The reduction of a text's hidden states to one vector; of several modes, one by one.

    ``layers`` are what the pooled vector goes through. ``include_prompt``: see ``Pool``.
    """

    mode: Mode | tuple[Mode, ...]
    normalize: bool
    layers: nn.Module | None = None
    include_prompt: bool = True

    @property
    def modes(self) -> tuple[Mode, ...]:
        """One or several, whose vectors are put one after the other."""
        return (self.mode,) if isinstance(self.mode, str) else self.mode

    def pool(self, lengths: Tensor, prompt_tokens: Sequence[int]) -> Pool:
        """A pool for texts of these lengths (B), with so many tokens of a prompt in front."""
        skipped = [0] * len(lengths) if self.include_prompt else list(prompt_tokens)
        return Pool(self.modes, lengths, torch.tensor(skipped or [0] * len(lengths)))

    def finish(
        self, pooled: Tensor, dimensions: int | None, normalize: bool | None = None
    ) -> list[bytes]:
        """(B, H) as little-endian float32, cut to the first ``dimensions``. Raises EngineFailed."""
        vectors = pooled if self.layers is None else self.layers(pooled)
        vectors = vectors[:, :dimensions]
        if self.normalize if normalize is None else normalize:
            vectors = nn.functional.normalize(vectors, dim=1)
        return [row.tobytes() for row in checked(vectors).cpu().numpy().astype("<f4")]


class Pool:
    """Takes the hidden states of texts (B), of all tokens at once or piece by piece.

    ``lengths`` (B): behind them is padding; ``skipped`` (B): tokens in front that take no part.
    """

    def __init__(self, modes: Sequence[Mode], lengths: Tensor, skipped: Tensor) -> None:
        self.modes = modes
        self._lengths, self._skipped = lengths[:, None], skipped[:, None]
        self._parts: dict[str, Tensor] = {}
        self._done = 0

    def add(self, hidden: Tensor) -> None:
        """Add the states (B, T, H) of the next T tokens of each text."""
        positions = torch.arange(self._done, self._done + hidden.shape[1])[None]  # (1, T)
        self._done += hidden.shape[1]
        takes_part = (positions < self._lengths) & (positions >= self._skipped)  # (B, T)
        first = torch.where(self._skipped < self._lengths, self._skipped, 0)
        for mode in dict.fromkeys(self.modes):
            if mode in _SUMS:
                weights = takes_part.float().to(hidden.device)
                if mode == "weightedmean":
                    weights = weights * (positions.to(hidden.device) + 1)
                self._sum(mode, hidden, weights)
            elif mode == "max":
                hidden_from = ~takes_part[:, :, None].to(hidden.device)
                largest = hidden.masked_fill(hidden_from, -torch.inf).max(1).values
                self._parts[mode] = torch.maximum(self._parts.get(mode, largest), largest)
            else:
                here = positions == (first if mode == "cls" else self._lengths - 1)
                self._pick(mode, hidden, here)

    def vectors(self) -> Tensor:
        """The pooled vectors (B, H), of several modes (B, H times their number)."""
        return torch.cat([self._vector(mode) for mode in self.modes], dim=1)

    def _sum(self, mode: Mode, hidden: Tensor, weights: Tensor) -> None:
        total, count = (hidden * weights[:, :, None]).sum(1), weights.sum(1, keepdim=True)
        if mode in self._parts:
            total, count = total + self._parts[mode], count + self._parts[f"{mode} of"]
        self._parts[mode], self._parts[f"{mode} of"] = total, count

    def _pick(self, mode: Mode, hidden: Tensor, here: Tensor) -> None:
        rows = here.any(1).to(hidden.device)[:, None]
        at = here.int().argmax(1).to(hidden.device)
        picked = hidden[torch.arange(len(hidden), device=hidden.device), at]
        self._parts[mode] = torch.where(rows, picked, self._parts.get(mode, picked))

    def _vector(self, mode: Mode) -> Tensor:
        if mode not in _SUMS:
            return self._parts[mode]
        count = self._parts[f"{mode} of"].clamp(min=1e-9)
        total = self._parts[mode]
        return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        """Scale vectors (B, H) to length one."""
        return nn.functional.normalize(vectors, dim=-1)


def load_layers(
    steps: Sequence[tuple[str, Path, Mapping[str, Any]]], device: str
) -> nn.Sequential | None:
    """The layers behind a pooling: kind, folder with weights, and configuration of each.

    None where there are none. Raises ModelLoadFailed.
    """
    layers = [_LAYERS[kind](folder, config) for kind, folder, config in steps]
    return nn.Sequential(*layers).float().eval().to(device) if layers else None


def _dense(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    weights = {name.removeprefix("linear."): tensor for name, tensor in _weights(folder).items()}
    matrix, bias = weights.get("weight"), weights.get("bias")
    sizes = (config.get("out_features"), config.get("in_features"))
    if matrix is None or tuple(matrix.shape) != sizes or (bias is not None) != _has_bias(config):
        raise ModelLoadFailed(f"{folder}: the weights are not those of its config.json")
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    linear.load_state_dict(weights)
    name = str(config.get("activation_function") or "Tanh").rpartition(".")[2]
    activation = nn.Softmax(dim=-1) if name == "Softmax" else getattr(nn, name)()
    return nn.Sequential(linear, activation)


def _has_bias(config: Mapping[str, Any]) -> bool:
    return config.get("bias") is not False


def _layer_norm(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    weights = {name.removeprefix("norm."): tensor for name, tensor in _weights(folder).items()}
    size = config.get("dimension")
    if not isinstance(size, int) or {tuple(t.shape) for t in weights.values()} != {(size,)}:
        raise ModelLoadFailed(f"{folder}: the weights are not those of its config.json")
    norm = nn.LayerNorm(size)
    norm.load_state_dict(weights)
    return norm


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "model.safetensors")
    except Exception as error:  # the library raises its own
        raise ModelLoadFailed(f"{folder / 'model.safetensors'} cannot be read: {error}") from None


_LAYERS: dict[str, Callable[[Path, Mapping[str, Any]], nn.Module]] = {
    "dense": _dense,
    "layer_norm": _layer_norm,
    "normalize": lambda _folder, _config: _Normalize(),
}

"""Lenses and autoencoders that are stored, for a model that they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers_api.errors import InvalidRequest
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.lens_maps import LensMaps
from transformers_api.inspection.sae import Sae
from transformers_api.serving.inspect.lens_files import lens_of
from transformers_api.serving.inspect.sae_files import sae_of
from transformers_api.serving.inspect.tensor_store import StoredTensors
from transformers_api.serving.swap.loaded_model import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesRequest:
    """Which features of a stored autoencoder to note: the largest."""

    sae: str
    topk: int = 8


def lens_via(
    model: LoadedModel,
    anatomy: Anatomy,
    name: str | None,
    stored: Callable[[str], StoredTensors],
    param: str,
) -> LensMaps | None:
    """The lens of a name; None without one. Raises NotFound, InvalidRequest."""
    if name is None:
        return None
    tensors = stored(name)
    _check_model(model, f"lens '{name}'", tensors.meta, param)
    lens = lens_of(tensors)
    check_lens(lens, anatomy, f"lens '{name}'", param)
    return lens


def sae_for(
    model: LoadedModel, anatomy: Anatomy, name: str, stored: StoredTensors, param: str
) -> Sae:
    """The autoencoder of a name. Raises InvalidRequest."""
    _check_model(model, f"sae '{name}'", stored.meta, param)
    sae = sae_of(name, stored)
    check_sae(sae.width, sae.part, sae.layer, anatomy, f"sae '{name}'", param)
    return sae


def check_lens(lens: LensMaps, anatomy: Anatomy, name: str, param: str) -> None:
    """Raise InvalidRequest for another width, or layers that are not there."""
    if lens.width != anatomy.hidden_size:
        raise InvalidRequest(
            f"{name} has {lens.width} numbers, the model's stream {anatomy.hidden_size}",
            param=param,
        )
    if lens.layers[-1] >= anatomy.layers:
        raise InvalidRequest(
            f"{name} has layer {lens.layers[-1]}, the model layers up to {anatomy.layers - 1}",
            param=param,
        )


def check_sae(width: int, part: str, layer: int, anatomy: Anatomy, name: str, param: str) -> None:
    """The same."""
    if width != anatomy.hidden_size:
        raise InvalidRequest(
            f"{name} has {width} numbers, the model's stream {anatomy.hidden_size}", param=param
        )
    first = -1 if part == "resid" else 0
    if not first <= layer < anatomy.layers:
        raise InvalidRequest(
            f"{name} is of layer {layer}; layers must be in [{first}, {anatomy.layers - 1}]",
            param=param,
        )


def _check_model(model: LoadedModel, name: str, meta: Mapping[str, Any], param: str) -> None:
    if meta["model"] not in (model.spec.name, model.spec.resident.name):
        raise InvalidRequest(f"{name} was made for model '{meta['model']}'", param=param)

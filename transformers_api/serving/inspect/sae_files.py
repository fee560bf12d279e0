"""Sparse autoencoders from the files that people publish: SAELens, Gemma Scope."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy
from numpy.typing import NDArray

from transformers_api.checkpoints.headers.tensor_file import read_tensors
from transformers_api.errors import InvalidRequest, ModelLoadFailed
from transformers_api.inspection.sae import ARCHITECTURES, Architecture, Normalization, Sae, SaePart
from transformers_api.serving.inspect.lens_files import MOST_UNPACKED
from transformers_api.serving.inspect.tensor_store import StoredTensors

Array = NDArray[numpy.float32]
Place = tuple[SaePart, int]
MOST_CFG = 1 << 20  # bytes
_HOOK = re.compile(r"blocks\.(\d{1,4})\.(?:ln\d\.)?hook_(resid_pre|resid_post|mlp_out|attn_out)")
_PARTS: Mapping[str, SaePart] = {
    "resid_pre": "resid",
    "resid_post": "resid",
    "mlp_out": "mlp",
    "attn_out": "attn",
}
_RELU = ("relu", "topk", "batchtopk", "jumprelu")
_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeFile:
    """An autoencoder as a file has it: its numbers, and what it is."""

    tensors: Mapping[str, Array]
    architecture: Architecture
    place: Place
    k: int
    subtracts_bias: bool
    normalization: Normalization
    source: str

    @property
    def meta(self) -> dict[str, Any]:
        """All but the numbers, for the store."""
        part, layer = self.place
        return {
            "architecture": self.architecture,
            "part": part,
            "layer": layer,
            "k": self.k,
            "subtracts_bias": self.subtracts_bias,
            "normalization": self.normalization,
            "source": self.source,
            "width": int(self.tensors["encoder"].shape[0]),
            "features": int(self.tensors["encoder"].shape[1]),
        }


def sae_of_files(
    weights: bytes, cfg: bytes | None, place: Place | None, architecture: str | None, k: int | None
) -> SaeFile:
    """An autoencoder of its weights and, where there is one, its ``cfg.json``.

    ``place``, ``architecture`` and ``k`` come before what that says. Raises InvalidRequest.
    """
    options = _options(cfg)
    try:
        tensors, source = read_tensors(weights, max(MOST_UNPACKED, 2 * len(weights)))
    except ModelLoadFailed as error:
        raise _refused(str(error)) from None
    numbers = _numbers(tensors)
    kind = architecture or _architecture(options, numbers)
    if kind not in ARCHITECTURES:
        raise InvalidRequest(
            f"architecture must be one of: {', '.join(ARCHITECTURES)}", param="architecture"
        )
    own: Architecture = kind
    count = k or _k(options)
    if own == "topk" and not count:
        raise InvalidRequest("k is required for topk: send ?k=", param="k")
    checked = _checked(own, numbers)
    features = checked["encoder"].shape[1]
    if own == "topk" and count > features:
        raise InvalidRequest(f"k must be at most {features}, as there are features", param="k")
    return SaeFile(
        tensors=checked,
        architecture=own,
        place=place or _place(options),
        k=count if own == "topk" else 0,
        subtracts_bias=_flag(options, "apply_b_dec_to_input", bool(options)),
        normalization=_normalization(options),
        source=source,
    )


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The file is refused: {reason}")


def _options(cfg: bytes | None) -> Mapping[str, Any]:
    """The object of cfg.json; what newer ones have in ``metadata`` is beside the rest."""
    if cfg is None:
        return {}
    try:
        if len(cfg) > MOST_CFG:
            raise ValueError(f"it has {len(cfg)} bytes")
        options = json.loads(cfg)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"cfg is not JSON: {error}", param="cfg") from None
    if not isinstance(options, dict):
        raise InvalidRequest("cfg must be a JSON object", param="cfg")
    inner = options.get("metadata")
    if options.get("rescale_acts_by_decoder_norm"):
        raise InvalidRequest(
            "cfg.rescale_acts_by_decoder_norm is to be folded into the weights first", param="cfg"
        )
    return {**(inner if isinstance(inner, dict) else {}), **options}


def _architecture(options: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    kind = options.get("architecture")
    activation = options.get("activation_fn_str", options.get("activation_fn"))
    if activation in ("topk", "batchtopk") or kind == "batchtopk":
        return "topk"
    if kind is not None:
        return str(kind)
    if activation not in (None, *_RELU):
        raise InvalidRequest(f"cfg.activation_fn '{activation}' is not known", param="cfg")
    if "threshold" in tensors:
        return "jumprelu"
    return "gated" if "r_mag" in tensors else "standard"


def _k(options: Mapping[str, Any]) -> int:
    inner = options.get("activation_fn_kwargs")
    value = options.get("k", inner.get("k") if isinstance(inner, dict) else None)
    return value if type(value) is int and value > 0 else 0


def _flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    value = options.get(name, default)
    if type(value) is not bool:
        raise InvalidRequest(f"cfg.{name} must be true or false", param="cfg")
    return value


def _normalization(options: Mapping[str, Any]) -> Normalization:
    value = options.get("normalize_activations") or "none"
    if value not in _NORMALIZATIONS:
        raise InvalidRequest(
            f"cfg.normalize_activations must be one of: {', '.join(_NORMALIZATIONS)}; '{value}' is "
            "to be folded into the weights first",
            param="cfg",
        )
    return cast(Normalization, value)


def _place(options: Mapping[str, Any]) -> Place:
    name = options.get("hook_name")
    if name is None:
        raise InvalidRequest(
            "the place is not known: send cfg with hook_name, or ?part= and ?layer=", param="layer"
        )
    match = _HOOK.fullmatch(str(name))
    if match is None:
        raise InvalidRequest(
            f"cfg.hook_name '{name}' is none of hook_resid_pre, hook_resid_post, hook_mlp_out and "
            "hook_attn_out of blocks.N; send ?part= and ?layer=",
            param="cfg",
        )
    layer = int(match[1]) - (match[2] == "resid_pre")  # after the layer before
    return _PARTS[match[2]], layer


_NAMES = {
    "W_enc": "encoder",
    "W_dec": "decoder",
    "b_enc": "encoder_bias",
    "b_dec": "decoder_bias",
    "threshold": "threshold",
    "r_mag": "r_mag",
    "b_mag": "b_mag",
    "b_gate": "encoder_bias",
}


def _numbers(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
    missing = [name for name in ("W_enc", "W_dec", "b_dec") if name not in tensors]
    if missing:
        names = ", ".join(list(tensors)[:8]) or "none"
        raise _refused(f"it has no {missing[0]}; there are: {names}")
    numbers: dict[str, Array] = {}
    for name, own in _NAMES.items():
        if name in tensors:
            with numpy.errstate(over="ignore"):
                numbers[own] = numpy.ascontiguousarray(tensors[name], numpy.float32)
            if not numpy.isfinite(numbers[own]).all():
                raise _refused("every number must be finite")
    return numbers


def _checked(architecture: Architecture, numbers: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays that the architecture has, with the shapes they must have."""
    encoder = numbers["encoder"]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise _refused(f"W_enc has the shape {list(encoder.shape)}; it must be [C, F]")
    width, count = encoder.shape
    shapes: dict[str, tuple[int, ...]] = {
        "encoder": (width, count),
        "decoder": (count, width),
        "encoder_bias": (count,),
        "decoder_bias": (width,),
    }
    if architecture == "jumprelu":
        shapes["threshold"] = (count,)
    if architecture == "gated":
        shapes |= {"r_mag": (count,), "b_mag": (count,)}
    for name, shape in shapes.items():
        if name not in numbers:
            raise _refused(f"an autoencoder that is {architecture} needs its {name}")
        if numbers[name].shape != shape:
            raise _refused(
                f"the {name} has the shape {list(numbers[name].shape)}; it must be {list(shape)}"
            )
    return {name: numbers[name] for name in shapes}


_BASE = ("encoder", "decoder", "encoder_bias", "decoder_bias")


def sae_of(name: str, stored: StoredTensors) -> Sae:
    """The autoencoder that was stored."""
    meta, tensors = stored.meta, stored.tensors
    return Sae(
        name=name,
        digest=stored.digest,
        architecture=meta["architecture"],
        part=meta["part"],
        layer=meta["layer"],
        encoder=tensors["encoder"],
        decoder=tensors["decoder"],
        encoder_bias=tensors["encoder_bias"],
        decoder_bias=tensors["decoder_bias"],
        extra={each: tensors[each] for each in tensors if each not in _BASE},
        k=meta["k"],
        subtracts_bias=meta["subtracts_bias"],
        normalization=meta["normalization"],
    )

"""The field ``intervene``: changes of a model's numbers while it reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, post_load

from transformers_api.api.http.fields import (
    NOT_GIVEN,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    StrictSchema,
    Text,
    TokenIds,
    Unsupported,
)
from transformers_api.api.http.sampling_schema import about
from transformers_api.api.intervene.positions import MOST_NAMED, At, whole_numbers
from transformers_api.api.intervene.vector_field import VectorField
from transformers_api.inspection.editable import INPUTS, PARTS
from transformers_api.serving.inspect.edit_request import (
    EditRequest,
    ForceRequest,
    InterveneRequest,
)

_ANY = 2**63
_HUGE = 1e38
_NUMBERS = {"type": "array", "items": {"type": "integer"}}
NAME = r"[a-z0-9._-]{1,64}"


class _Named(fields.Field[Any]):
    """A list of whole numbers, or "all"."""

    def __init__(self, description: str, **options: Any) -> None:
        shape = [_NUMBERS, {"type": "string", "enum": ["all"]}]
        super().__init__(error_messages=NOT_GIVEN, **about(description, oneOf=shape), **options)

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Any:
        return value if value == "all" else whole_numbers(value, 'must be integers, or "all"')


class _With(fields.Field[Any]):
    """Words, or a prompt whose numbers are taken."""

    EXPECTED = 'must be "zero", "mean", {"prompt": text} or {"run": id}'

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Any:
        match value:
            case "zero" | "mean":
                return value
            case {"prompt": str(text), **rest} if text and not rest:
                return {"source": text}
            case {"run": str(run), **rest} if run and not rest:
                return {"run": run}
        raise ValidationError(self.EXPECTED)


class _From(fields.Field[Any]):
    """A prompt or a run whose numbers are taken, and the positions there."""

    EXPECTED = 'must be {"prompt": text, "at": positions} or {"run": id, "at": positions}'

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **_: Any
    ) -> Any:
        match value:
            case {"prompt": str(text), **rest} if text and set(rest) <= {"at"}:
                made = {"source": text}
            case {"run": str(run), **rest} if run and set(rest) <= {"at"}:
                made = {"run": run}
            case _:
                raise ValidationError(self.EXPECTED)
        at = rest.get("at")
        if isinstance(at, list):  # in their order, and one may be there twice
            whole_numbers(at, self.EXPECTED)
        elif at is not None:
            at = At()._deserialize(at, attr, data)
        return {**made, "source_at": at}


class EditOptions(StrictSchema):
    """One change."""

    do = Text(
        choices=(
            "add",
            "erase",
            "ablate",
            "scale",
            "set",
            "patch",
            "block",
            "temper",
            "feature",
            "force",
        ),
        required=True,
        **about("The kind of change."),
    )
    part = Text(
        choices=(*PARTS, *INPUTS),
        load_default="resid",
        **about(
            "`resid`: the stream after the layer; `attn`, `mlp`: what they write into it; `head`: "
            "its output before the projection; `neuron`: of the MLP; `q`, `k`, `v`: as attention "
            "reads them."
        ),
    )
    layer = Integer(-_ANY, _ANY - 1, **about("One layer, from 0; -1 is the embedding."))
    layers = _Named('Several, or "all".')
    range = Many(
        Integer(-_ANY, _ANY - 1),
        shortest=2,
        longest=2,
        **about("`[first, last]`: these layers and all between."),
    )
    at = At(
        load_default="all",
        **about("The positions of the tokens that are read: see the guide."),
    )
    heads = _Named('Heads, from 0, or "all".')
    neurons = _Named('Neurons, from 0, or "all".')
    vector = VectorField(
        error_messages=NOT_GIVEN,
        **about("Numbers, or a name: what is added, erased or set. Several rows: one per layer."),
    )
    any_model = Boolean(
        load_default=False, **about("Use a stored vector that was made for another model.")
    )
    scale = Number(-_HUGE, _HUGE, load_default=1.0, **about("Of add: times the vector."))
    by = Number(-_HUGE, _HUGE, **about("Of scale: times what is there."))
    value = Number(
        -_HUGE, _HUGE, **about("Of set, of feature, and of neurons that are added to: a number.")
    )
    sae = Text(
        shortest=1,
        longest=64,
        **about("Of feature: name of a [sparse autoencoder](#inspectsaes), with its place."),
    )
    feature = Integer(0, (1 << 31) - 1, **about("Of feature: its number."))
    units = Text(
        choices=("raw", "norm"),
        load_default="raw",
        **about("`norm`: the vector is made as long as the layer's `resid_norm` first."),
    )
    keep_norm = Boolean(
        load_default=False, **about("Make each vector as long again as it was before.")
    )
    instead = _With(
        data_key="with",
        error_messages=NOT_GIVEN,
        **about(
            "Of ablate: `zero`, `mean` over our texts, or the numbers of another prompt or run."
        ),
    )

    origin = _From(
        data_key="from",
        error_messages=NOT_GIVEN,
        **about(
            "Of patch: the prompt or the run that the numbers are from, and the positions there."
        ),
    )
    queries = At(**about("Of block: the positions that read, as in `at`; without it all."))
    keys = At(may_be_empty=True, **about("Of block: the positions that they do not read from."))
    temperature = Number(
        1e-3, 1e3, **about("Of temper: what the scores of attention are divided by.")
    )
    step = Integer(0, (1 << 31) - 1, **about("Of force: the output token that comes first."))
    token_ids = TokenIds(shortest=1, **about("Of force: these tokens, whatever the model says."))

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> EditRequest | ForceRequest:
        """The edit as serving takes it."""
        if data["do"] == "force":
            return _force(data)
        for name in ("step", "token_ids"):
            if name in data:
                raise ValidationError("is for force", name)
        if data["do"] == "feature":
            return _feature(data)
        for name in ("sae", "feature"):
            if name in data:
                raise ValidationError("is for feature", name)
        layers = _layers(data)
        _check(data)
        if data["do"] in ("block", "temper"):
            data["part"] = "weights"
        instead = data.pop("instead", "zero")
        data |= instead if isinstance(instead, dict) else {"instead": instead}
        data |= data.pop("origin", {})
        return EditRequest(layers=layers, **data)


def _force(data: dict[str, Any]) -> ForceRequest:
    others = data.keys() - {"do", "step", "token_ids"}
    for name in sorted(others):
        if name not in _LOADED or data[name] != _LOADED[name]:
            raise ValidationError("is not for force", _KEYS.get(name, name))
    for name in ("step", "token_ids"):
        if name not in data:
            raise ValidationError("is required for force", name)
    return ForceRequest(data["step"], tuple(data["token_ids"]))


def _feature(data: dict[str, Any]) -> EditRequest:
    needed = ("sae", "feature", "value")
    for name in sorted(data.keys() - {"do", "at", "keep_norm", *needed}):
        if name not in _LOADED or data[name] != _LOADED[name]:
            raise ValidationError("is not for feature", "with" if name == "instead" else name)
    for name in needed:
        if name not in data:
            raise ValidationError("is required for feature", name)
    own = {name: data[name] for name in ("do", "at", "keep_norm", *needed)}
    return EditRequest(**own)


def _layers(data: dict[str, Any]) -> Any:
    names = [name for name in ("layer", "layers", "range") if name in data]
    if len(names) != 1:
        there = " and ".join(names) or "none"
        raise ValidationError(f"needs exactly one of layer, layers, range; there is {there}")
    value = data.pop(names[0])
    if names[0] == "layer":
        return (value,)
    if names[0] == "layers":
        return value
    first, last = value
    if not 0 <= last - first < MOST_NAMED:
        raise ValidationError("must be [first, last]", "range")
    return tuple(range(first, last + 1))


# The fields that a change needs, one of each group, and those that mean nothing to it.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "add": ("vector", "value"),
    "erase": ("vector",),
    "scale": ("by",),
    "set": ("vector", "value"),
    "patch": ("origin",),
    "block": ("keys",),
    "temper": ("temperature",),
}
_OWN = {
    "scale": ("add",),
    "units": ("add",),
    "by": ("scale",),
    "value": ("add", "set"),
    "vector": ("add", "erase", "set"),
    "instead": ("ablate",),
    "origin": ("patch",),
    "queries": ("block",),
    "keys": ("block",),
    "temperature": ("temper",),
}
_KEYS = {"instead": "with", "origin": "from"}  # as clients know them
_PARTS = {"heads": "head", "neurons": "neuron"}
_DEFAULTS: Mapping[str, Any] = {"scale": 1.0, "units": "raw"}
_LOADED = {**_DEFAULTS, "part": "resid", "at": "all", "any_model": False, "keep_norm": False}


def _check(data: dict[str, Any]) -> None:
    do, part = data["do"], data["part"]
    for name, kinds in _OWN.items():
        if name in data and do not in kinds and data[name] != _DEFAULTS.get(name):
            raise ValidationError(f"is not for {do}", _KEYS.get(name, name))
    needed = _NEEDS.get(do, ())
    present = [name for name in needed if name in data]
    if needed and len(present) != 1:
        problem = "is one too many" if present else f"is required for {do}"
        raise ValidationError(problem, _KEYS.get(needed[0], needed[0]))
    if do in ("block", "temper"):
        _check_attention(data)
        return
    for name, own in _PARTS.items():
        if name in data and part != own and not (name == "heads" and part in INPUTS):
            raise ValidationError(f'is for part "{own}"', name)
        if part == own and name not in data:
            raise ValidationError(f"is required for part {part}", name)
    if do == "add" and "value" in data and part != "neuron":
        raise ValidationError("is added to neurons only; use a vector", "value")
    if do == "erase" and (part == "neuron" or part in INPUTS):
        raise ValidationError("must be resid, attn, mlp or head for erase", "part")


def _check_attention(data: dict[str, Any]) -> None:
    do = data["do"]
    if data["part"] != "resid":
        raise ValidationError(f"is not for {do}, which is about attention weights", "part")
    if "neurons" in data:
        raise ValidationError('is for part "neuron"', "neurons")
    if data["keep_norm"]:
        raise ValidationError(f"is not for {do}", "keep_norm")
    if do == "block" and data["at"] != "all":
        raise ValidationError("is not for block, which has queries and keys", "at")


class InterveneOptions(StrictSchema):
    """Changes of what the model computes, for this request alone."""

    edits = Many(
        Object(EditOptions),
        shortest=1,
        longest=4096,
        required=True,
        **about("The changes, in their order: up to 32."),
    )

    compare: fields.Field[Any] = Unsupported()
    store: fields.Field[Any] = Unsupported()

    @post_load(pass_original=True)
    def make(self, data: dict[str, Any], original: Any, **_: Any) -> InterveneRequest:
        """The options as serving takes them."""
        return InterveneRequest(
            edits=tuple(data["edits"]),
            compares=data.get("compare") == "forced",
            has_twins=data.get("compare") == "free",
            store=bool(data.get("store")),
            source=original,
        )


class WritingInterveneOptions(InterveneOptions):
    """The same of an answer, which may be kept as a run."""

    store = Boolean(load_default=False, **about("Keep the answer as a [run](#inspectruns)."))


class ComparedInterveneOptions(WritingInterveneOptions):
    """The same of an answer whose tokens the unedited model may be asked about as well."""

    compare = Text(
        choices=("forced", "free"),
        **about(
            "`forced`: the unedited model reads the answer too, once it is complete; `free`: it "
            "writes one of its own beside it."
        ),
    )

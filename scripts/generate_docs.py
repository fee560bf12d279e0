"""Write the generated tables of docs/ anew: `make docs`.

A table stands between `<!-- begin NAME -->` and `<!-- end -->`; what it says comes from the code,
and a test fails while a page says something else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin

from transformers_api import errors
from transformers_api.api.anthropic.schema import MessageRequest
from transformers_api.api.http.field_table import ALL, ASKS_NOTHING, BOTH, TABLE, Entry, Treatment
from transformers_api.api.http.fields import Schema, Unsupported
from transformers_api.api.http.sampling_schema import Sampling
from transformers_api.api.inspect.schemas.grids import AblateRequest, PatchRequest
from transformers_api.api.inspect.schemas.inspect import (
    AttributionRequest,
    FullAttentionRequest,
    HeadsRequest,
    HiddenStatesRequest,
    Inspected,
    LensRequest,
    MatrixRequest,
    TokensRequest,
)
from transformers_api.api.inspect.schemas.logit_parts import LogitPartsRequest
from transformers_api.api.inspect.schemas.runs import RunRequest
from transformers_api.api.inspect.schemas.stability import StabilityRequest
from transformers_api.api.inspect.schemas.vectors import DerivationRequest, VectorBody
from transformers_api.api.intervene.branch import BranchOptions
from transformers_api.api.intervene.schema import EditOptions
from transformers_api.api.llamacpp.schema import ApplyTemplateRequest, InfillRequest
from transformers_api.api.ollama.schema import OllamaOptions
from transformers_api.api.openai.schemas.chat import ChatRequest, Message
from transformers_api.api.openai.schemas.completions import CompletionRequest
from transformers_api.api.openai.schemas.embeddings import EmbeddingRequest
from transformers_api.api.openai.schemas.models import LoadRequest
from transformers_api.api.openai.schemas.rerank import RerankRequest, ScoreRequest
from transformers_api.api.openai.schemas.structured import Structured
from transformers_api.api.openai.schemas.tokens import DetokenizeRequest, TokenizeRequest
from transformers_api.api.responses.schema import ResponseRequest
from transformers_api.api.seeds.schemas.chat_stream import ChatStreamRequest
from transformers_api.api.seeds.schemas.generate import GenerateRequest, LoadModelRequest
from transformers_api.api.trace.schema import (
    ActivationOptions,
    LensOptions,
    PartsOptions,
    StreamTrace,
    TraceOptions,
)
from transformers_api.config.described import described
from transformers_api.inspection import edit_plan  # noqa: F401 - which has errors of its own
from transformers_api.metric_names import described as described_metrics

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"<!-- begin (?P<name>[\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def settings() -> str:
    """Every setting."""
    rows = [
        (f"`{name}`", _code(default), help_, _codes(aliases.split(", ")))
        for name, default, aliases, help_ in described()
    ]
    return table(("setting", "default", "what it does", "other names"), rows)


def error_codes() -> str:
    """Every error that has a code."""
    rows = [
        (f"`{kind.code}`", str(kind.status), f"`{kind.type}`", _first_line(kind))
        for kind in sorted(_family(errors.ApiError), key=lambda kind: (kind.status, kind.code))
    ]
    return table(("`code`", "status", "`type`", "when"), rows)


def metrics() -> str:
    """Every metric."""
    rows = [
        (f"`{name}`", kind, _codes(labels.split(", ")), text)
        for name, kind, labels, text in described_metrics()
    ]
    return table(("metric", "type", "labels", "what it says"), rows)


def fields(schema: type[Schema], *without: type[Schema]) -> Callable[[], str]:
    """A table of the fields that ``schema`` takes and none of ``without`` does."""

    def render() -> str:
        shared = {name for other in without for name in other().fields}
        known = {name: f for name, f in schema().fields.items() if name not in shared}
        rows = [
            (
                f"`{field.data_key or name}`",
                _values(_property(field)),
                _default(field),
                _about(field),
            )
            for name, field in known.items()
            if not isinstance(field, Unsupported)
        ]
        refused = [name for name, field in known.items() if isinstance(field, Unsupported)]
        text = table(("field", "values", "default", "what it does"), rows)
        if refused:
            text += f"\n\nRefused by name, unless they ask for nothing: {_codes(refused)}."
        return text

    return render


def aliases() -> str:
    """The fields that stand for others."""
    rows = [
        (f"`{entry.name}`", f"`{entry.of}`", _routes(entry))
        for entry in TABLE
        if entry.treatment is Treatment.ALIAS
    ]
    return table(("field", "stands for", "on"), rows)


def refused() -> str:
    """The fields that are refused by name."""
    rows = [
        (
            f"`{entry.name}`",
            _neutral(entry),
            _routes(entry),
            f"`{entry.of}`" if entry.of else "",
        )
        for entry in TABLE
        if entry.treatment is Treatment.REFUSED
    ]
    return table(("field", "asks for nothing", "on", "see"), rows)


def harmless() -> str:
    """The fields that are ignored."""
    names = [
        f"`{entry.name}`" + ("" if set(entry.routes) >= {*BOTH} else f" ({_routes(entry)})")
        for entry in TABLE
        if entry.treatment is Treatment.HARMLESS
    ]
    return f"{', '.join(names)}."


def _neutral(entry: Entry) -> str:
    if entry.neutral == ASKS_NOTHING:
        return "`false`, `0`, empty"
    return _codes([json.dumps(value) for value in entry.neutral]) or "null alone"


def _routes(entry: Entry) -> str:
    return "all" if entry.routes == ALL else ", ".join(entry.routes)


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "errors": error_codes,
    "metrics": metrics,
    "sampling fields": fields(Sampling),
    "form fields": fields(Structured),
    "alias fields": aliases,
    "refused fields": refused,
    "harmless fields": harmless,
    "response fields": fields(ResponseRequest),
    "message request fields": fields(MessageRequest),
    "ollama fields": fields(OllamaOptions),
    "completion fields": fields(CompletionRequest, Sampling, Structured),
    "chat fields": fields(ChatRequest, Sampling, Structured),
    "message fields": fields(Message),
    "trace fields": fields(TraceOptions),
    "lens fields": fields(LensOptions),
    "activation fields": fields(ActivationOptions),
    "parts fields": fields(PartsOptions),
    "edit fields": fields(EditOptions),
    "branch fields": fields(BranchOptions),
    "rerank fields": fields(RerankRequest),
    "score fields": fields(ScoreRequest),
    "infill fields": fields(InfillRequest, Sampling, Structured),
    "template fields": fields(ApplyTemplateRequest),
    "embedding fields": fields(EmbeddingRequest),
    "load fields": fields(LoadRequest),
    "generate fields": fields(GenerateRequest),
    "load_model fields": fields(LoadModelRequest),
    "chat_stream fields": fields(ChatStreamRequest),
    "chat_stream trace fields": fields(StreamTrace, TraceOptions),
    "tokenize fields": fields(TokenizeRequest),
    "detokenize fields": fields(DetokenizeRequest),
    "inspected fields": fields(Inspected),
    "full_attn fields": fields(FullAttentionRequest, Inspected),
    "rollout fields": fields(MatrixRequest, Inspected),
    "inspect tokens fields": fields(TokensRequest, Inspected),
    "heads fields": fields(HeadsRequest, Inspected),
    "logit_lens fields": fields(LensRequest, Inspected),
    "attribution fields": fields(AttributionRequest, Inspected),
    "hidden_states fields": fields(HiddenStatesRequest, Inspected),
    "logit_parts fields": fields(LogitPartsRequest, Inspected),
    "patch fields": fields(PatchRequest),
    "ablate fields": fields(AblateRequest, Inspected),
    "run fields": fields(RunRequest),
    "stability fields": fields(StabilityRequest, Inspected),
    "vector fields": fields(VectorBody),
    "derivation fields": fields(DerivationRequest),
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in cells)


def rendered(text: str) -> str:
    """``text`` with every generated table made anew."""
    return BLOCK.sub(
        lambda block: f"<!-- begin {block['name']} -->\n{TABLES[block['name']]()}\n<!-- end -->",
        text,
    )


def main() -> None:
    """Bring every page up to date."""
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        if (new := rendered(text)) != text:
            page.write_text(new)
            sys.stdout.write(f"{page.relative_to(DOCS.parent)}\n")


def _family(kind: type[errors.ApiError]) -> Iterator[type[errors.ApiError]]:
    for child in kind.__subclasses__():
        if child.code and "code" in vars(child):
            yield child
        yield from _family(child)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n")[0].replace("``", "`")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _codes(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names if name)


def _property(field: Any) -> dict[str, Any]:
    """The OpenAPI property of a field."""
    plugin = MarshmallowPlugin(schema_name_resolver=lambda _schema: None)
    APISpec("", "", "3.1.0", plugins=[plugin])
    assert plugin.converter is not None
    return dict(plugin.converter.field2property(field))


def _values(found: dict[str, Any], plural: str = "") -> str:
    if "oneOf" in found:
        return " or ".join(dict.fromkeys(_values(one) for one in found["oneOf"]))
    kind = found.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if "enum" in found:
        return _codes([str(value) for value in found["enum"]])
    if kind == "array":
        most = f", at most {_number(found['maxItems'])}" if "maxItems" in found else ""
        return f"list{plural} of {_values(found['items'], plural='s')}{most}"
    return f"{kind}{plural}{_bounds(found)}"


def _bounds(found: dict[str, Any]) -> str:
    low, high = found.get("minimum", found.get("exclusiveMinimum")), found.get("maximum")
    if (low, high) == (-(2**63), 2**63 - 1):  # as many as there are
        return ""
    if high is not None:
        start = "above " if "exclusiveMinimum" in found else ""
        return f", {start}{_number(low)} to {_number(high)}"
    if "maxLength" in found:
        return f", {found.get('minLength', 0)} to {found['maxLength']} characters"
    if "pattern" in found:
        return f" like `{found['pattern'].removeprefix('(?:').removesuffix(')' + chr(92) + 'Z')}`"
    return ""


def _number(value: float) -> str:
    """Powers of two as such from a million on."""
    for number, rest in ((abs(int(value)), ""), (abs(int(value)) + 1, " - 1")):
        if number >= 1 << 20 and number.bit_count() == 1:
            return f"{'-' if value < 0 else ''}2^{number.bit_length() - 1}{rest}"
    return f"{value:g}"


def _default(field: Any) -> str:
    if field.required:
        return "required"
    default = field.load_default
    if default == "" or not isinstance(default, bool | int | float | str):
        return ""
    return f"`{str(default).lower()}`"


def _about(field: Any) -> str:
    return str(field.metadata.get("description", ""))


if __name__ == "__main__":
    main()

"""POST /inspect/*: questions about given tokens.

Each view is: what is asked about (``subjects.opened``), whether it is in range and not too
much, the job, the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy
from flask import Response, request

from transformers_api.api.http.auth import View
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.inspect import as_written, attention_page, subjects
from transformers_api.api.inspect import format as inspect_format
from transformers_api.api.inspect.as_written import Writing
from transformers_api.api.inspect.format import Matrix
from transformers_api.api.inspect.schemas.inspect import (
    Attributed,
    AttributionRequest,
    FullAttention,
    FullAttentionRequest,
    HeadsRequest,
    HeadTable,
    HiddenStates,
    HiddenStatesRequest,
    Lens,
    LensRequest,
    Rollout,
    RolloutRequest,
    TokensRequest,
    TokenTable,
)
from transformers_api.api.inspect.subjects import Format, Subject, opened
from transformers_api.errors import (
    AttentionUnavailable,
    InvalidRequest,
    ModelNotCapable,
    ResponseTooLarge,
)
from transformers_api.inspection import questions
from transformers_api.inspection.attribution_question import AttributionQuestion
from transformers_api.inspection.base import Heads, LayerAttention, TracePlan
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.stored_maps import lens_via
from transformers_api.serving.inspect.trace_plan import check_any_attention, check_layer
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint("inspect", __name__, dialect=NIELS, description="Looking inside")

MOST_LENS_CELLS = 4096
MOST_JSON_STATES = 65_536
MOST_STEPS = 128
NPZ = "application/x-npz"
_FILE = {"type": "string", "format": "binary"}
_BY_TYPE: Mapping[str, Format] = {
    "application/json": "json",
    NPZ: "npz",
    "image/png": "png",
    "text/html": "html",
}
_HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def _in_any_form(view: View) -> View:
    """Document what `Accept` may ask for beside JSON."""
    for content_type in reversed([*_BY_TYPE][1:]):
        view = blueprint.gives(_FILE, content_type=content_type)(view)
    return view


def _format(body: Mapping[str, Any]) -> Format:
    """The form that the client accepts, and in JSON the one that ``format`` says."""
    accepted = request.accept_mimetypes.best_match(_BY_TYPE, "application/json")
    how = _BY_TYPE[accepted]
    return body["format"] if how == "json" else how


@blueprint.at("/inspect/full_attn", methods=["POST"])
@blueprint.takes(FullAttentionRequest, example={**_HELLO, "trace_layer": 0, "head": 0})
@_in_any_form
@blueprint.gives(FullAttention)
@blueprint.gives(Failed, 404, description="No such model, or the completion is not known")
@blueprint.gives(Failed, 413, description="Too much text, too many tokens or too many numbers")
@blueprint.gives(Failed, 429, description="Asked too often, or too many are waiting")
def full_attn(body: dict[str, Any]) -> Any:
    """Show which tokens each token read from, in one layer.

    `Accept` chooses JSON, `application/x-npz`, `image/png` or `text/html`, a page of its own.
    """
    with opened(body) as subject:
        layer = check_layer(subject.anatomy, body["trace_layer"], "trace_layer")
        head, how = body["head"], _format(body)
        _check_head(head, layer, how)
        subject = subject.continued(body)
        writing = as_written.of(subject, body)
        if writing is not None:
            body = as_written.with_rows(body, writing)
        heads = layer.heads if head == "all" else 1
        rows, cols = _windows(subject, body, how, heads)
        heads_read: Heads = head
        if writing is not None:
            result = as_written.attention(writing, layer.layer, heads_read, rows, cols)
        else:
            question = questions.AttentionWindow(subject.ids, layer.layer, heads_read, rows, cols)
            result = subject.ask(question)
        vocabulary = Vocabulary(subject.model.tokenizer)
        matrix = Matrix(
            weights=result.weights,
            rows=rows,
            cols=cols,
            fields=inspect_format.full_attention(vocabulary, subject.ids, layer, head),
            rest={
                **inspect_format.about_layer(subject.anatomy, layer, head, subject.is_truncated),
                **as_written.header(subject, body),
                **subject.edit_header,
            },
            sink=result.sink,
            has_heads=head == "all",
        )
        return _sent(subject, matrix, body, how)


def _check_head(head: int | str, layer: LayerAttention, how: Format) -> None:
    if isinstance(head, int) and not 0 <= head < layer.heads:
        raise InvalidRequest(f"head must be in [0, {layer.heads - 1}]", param="head")
    if head == "all" and how in ("json", "png"):
        raise InvalidRequest(
            f'head "all" cannot be sent as {how}; use format "f16" or "u8", or Accept: {NPZ}',
            param="head",
        )


def _windows(
    subject: Subject, body: Mapping[str, Any], how: Format, heads: int = 1
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Which rows and columns are asked for, if they are not too many."""
    n = len(subject.ids)
    rows, cols = (subjects.window(body, name, n) for name in ("rows", "cols"))
    height, width = rows[1] - rows[0], cols[1] - cols[0]
    subjects.check_read_cells(heads * height * width, subject.settings)
    if "downsample" in body:
        height, width = (
            min(size, most) for size, most in zip((height, width), body["downsample"], strict=True)
        )
    subjects.check_sent_cells(heads * height * width, how, subject.settings)
    return rows, cols


def _sent(subject: Subject, matrix: Matrix, body: Mapping[str, Any], how: Format) -> Any:
    matrix = matrix.pooled(body.get("downsample"), body["reduce"])
    if how == "npz":
        return Response(matrix.npz(), content_type=NPZ)
    if how == "png":
        return Response(matrix.png(body.get("cell"), body["labels"]), content_type="image/png")
    if how == "html":
        page = matrix.html(subject.model.spec.name)
        response = Response(page, content_type="text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = attention_page.POLICY
        return response
    return matrix.json(how)


@blueprint.at("/inspect/rollout", methods=["POST"])
@blueprint.takes(RolloutRequest, example=_HELLO)
@_in_any_form
@blueprint.gives(Rollout)
@blueprint.gives(Failed, 413, description="Too much text, too many tokens or too many numbers")
def rollout(body: dict[str, Any]) -> Any:
    """Follow attention through layers to the tokens of the input.

    Of each layer the mean over its heads counts half, and what passes it by the other half. In a
    causal model all of it ends at the leftmost token, the more layers the surer. The forms of the
    answer are those of `/inspect/full_attn`.
    """
    with opened(body) as subject:
        anatomy, how = subject.anatomy, _format(body)
        check_any_attention(anatomy, "model")
        first, last = subjects.layer_range(body, anatomy)
        within = anatomy.attention[first : last + 1]
        without = [layer.layer for layer in within if not layer.available]
        if without:
            raise AttentionUnavailable(
                f"rollout needs attention in every layer; layers without attention: {without}",
                param="model",
            )
        rows, cols = _windows(subject, body, how)
        subjects.check_read_cells(len(subject.ids) ** 2, subject.settings)
        result = subject.ask(questions.Rollout(subject.ids, (first, last), body["drop_first"]))
        vocabulary = Vocabulary(subject.model.tokenizer)
        matrix = Matrix(
            weights=result[None, slice(*rows), slice(*cols)],
            rows=rows,
            cols=cols,
            fields={"layers": [first, last], **inspect_format.tokens(vocabulary, subject.ids)},
            rest={
                **inspect_format.about_all(anatomy, subject.is_truncated),
                "note": inspect_format.ROLLOUT_NOTE,
                **subject.edit_header,
            },
        )
        return _sent(subject, matrix, body, how)


@blueprint.at("/inspect/tokens", methods=["POST"])
@blueprint.takes(TokensRequest, example={**_HELLO, "logprobs": True, "topk": 3})
@blueprint.gives(TokenTable)
def inspect_tokens(body: dict[str, Any]) -> Any:
    """Show the tokens of a text, where they stand, and how surprising each was."""
    with opened(body) as subject:
        vocabulary = Vocabulary(subject.model.tokenizer)
        answer = inspect_format.token_table(vocabulary, subject.ids, subject.spans())
        if not body["logprobs"]:
            return answer
        answer |= {**as_written.header(subject, body), **subject.edit_header}
        if (writing := as_written.of(subject, body)) is not None:
            steps = writing.steps(TracePlan(topk=body["topk"]))
            return {**answer, **inspect_format.written(vocabulary, writing.first + 1, steps)}
        result = subject.ask(questions.PromptReading(subject.ids, body["topk"]))
        return {**answer, **inspect_format.reading(vocabulary, result)}


@blueprint.at("/inspect/heads", methods=["POST"])
@blueprint.takes(HeadsRequest, example={**_HELLO, "thumb": 16})
@blueprint.gives(HeadTable)
def inspect_heads(body: dict[str, Any]) -> Any:
    """Show every head of every layer at a glance: numbers, and small pictures if asked for."""
    with opened(body) as subject:
        anatomy, thumb = subject.anatomy, body["thumb"]
        check_any_attention(anatomy, "model")
        heads = max(layer.heads for layer in anatomy.attention)
        subjects.check_read_cells(anatomy.layers * heads * thumb**2, subject.settings)
        grid = subject.ask(questions.HeadGrid(subject.ids, thumb))
        return {**inspect_format.head_table(anatomy, len(subject.ids), grid), **subject.edit_header}


@blueprint.at("/inspect/logit_lens", methods=["POST"])
@blueprint.takes(LensRequest, example={"prompt": "The capital of France is", "topk": 3})
@blueprint.gives(Lens)
def logit_lens(body: dict[str, Any]) -> Any:
    """Read the residual stream after each layer through the model's own head.

    What a small model's early layers seem to say this way often means nothing; a lens that was
    trained for the model says more: `via`.
    """
    with opened(body) as subject:
        anatomy = subject.anatomy
        if not anatomy.lens:
            raise ModelNotCapable(
                f"model type {anatomy.model_type} has no logit lens: its residual stream cannot "
                "be read through its head",
                param="model",
            )
        layers = subjects.layers(body["layers"], anatomy)
        writing = as_written.of(subject, body)
        places = _positions(subject, body, writing)
        target = None
        if body["target"] != "sampled":
            target = subjects.token(body["target"], subject, "target")
        if (cells := len(layers) * len(places)) > MOST_LENS_CELLS:
            raise ResponseTooLarge(
                f"{len(layers)} layers x {len(places)} positions are {cells} cells "
                f"(max {MOST_LENS_CELLS}); ask for fewer layers or positions"
            )
        store = partial(subject.context.services.lenses.get, subject.context.client)
        via = lens_via(subject.model, anatomy, body.get("via"), store, "via")
        vocabulary = Vocabulary(subject.model.tokenizer)
        if writing is not None:
            if via is not None:
                raise InvalidRequest('via is for how "at_once"', param="via")
            if target is not None:
                raise InvalidRequest(
                    'target must be "sampled" with how "as_written"', param="target"
                )
            answer = as_written.lens(writing, layers, places, body["topk"])
        else:
            question = questions.Lens(subject.ids, layers, places, body["topk"], target, via)
            answer = subject.ask(question)
        table = inspect_format.lens_table(vocabulary, anatomy, layers, places, answer)
        named = {} if via is None else {"via": body["via"]}
        return {**table, **named, **as_written.header(subject, body), **subject.edit_header}


def _positions(subject: Subject, body: Mapping[str, Any], writing: Writing | None) -> list[int]:
    if writing is not None:
        return writing.positions(body["positions"])
    return subjects.positions(body["positions"], len(subject.ids))


@blueprint.at("/inspect/attribution", methods=["POST"])
@blueprint.takes(AttributionRequest, example={"prompt": "The capital of France is"})
@blueprint.gives(Attributed)
def attribution(body: dict[str, Any]) -> Any:
    """Say what each token did for the prediction of one.

    `occlusion` is how much likelier the target is with the token than with an average one in its
    place; where it would take too long, it is refused with what would not. `integrated_gradients`
    comes with `convergence_delta`, what it leaves unexplained, and with what its scores still
    moved by when its steps were doubled.
    """
    with opened(body) as subject:
        subjects.check_attribution_tokens(subject)
        steps = None if body["steps"] == "auto" else body["steps"]
        if steps is not None and not 1 <= steps <= MOST_STEPS:
            raise InvalidRequest(f"steps must be in [1, {MOST_STEPS}]", param="steps")
        token_id = body.get("target_token_id")
        if token_id is not None:
            subjects.token(token_id, subject, "target_token_id")
        place = subjects.position(body["target_position"], len(subject.ids), "target_position")
        newline = subjects.newline(subject) if body["baseline"] == "newline" else None
        question = AttributionQuestion(
            position=place,
            token_id=token_id,
            method=body["method"],
            steps=steps,
            baseline=body["baseline"] if newline is None else "token",
            baseline_token_id=newline or 0,
            of=body["of"],
            groups=subjects.groups(body, subject, place),
            screen=body["screen"],
            within_s=subject.settings.inspect_timeout_s,
        )
        result = subject.ask(questions.Attribution(subject.ids, question))
        vocabulary = Vocabulary(subject.model.tokenizer)
        scores = inspect_format.attribution(vocabulary, question, result)
        return {**scores, **subject.edit_header}


@blueprint.at("/inspect/hidden_states", methods=["POST"])
@blueprint.takes(HiddenStatesRequest, example={"prompt": "The colour", "format": "json"})
@blueprint.gives(HiddenStates)
@blueprint.gives(_FILE, content_type=NPZ)
def hidden_states(body: dict[str, Any]) -> Any:
    """Give the residual stream after each layer, as it is before the final norm.

    A file for numpy with `states` (float32, layers x positions x width), `token_ids` and `meta`;
    or JSON, of few numbers.
    """
    with opened(body) as subject:
        layers = subjects.layers(body["layers"], subject.anatomy)
        writing = as_written.of(subject, body)
        places = _positions(subject, body, writing)
        count = len(layers) * len(places) * subject.anatomy.hidden_size
        if body["format"] == "json" and count > MOST_JSON_STATES:
            raise ResponseTooLarge(
                f"{count} numbers as json (max {MOST_JSON_STATES}); ask for fewer layers or "
                'positions, or format "npz"'
            )
        subjects.check_read_cells(count, subject.settings)
        if writing is not None:
            result = as_written.states(writing, layers, places)
        else:
            result = subject.ask(questions.HiddenStates(subject.ids, layers, places))
        meta = {
            **inspect_format.states_meta(layers, places, subject.ids),
            **as_written.header(subject, body),
            **subject.edit_header,
        }
        if body["format"] == "json":
            return {**meta, "states": arrays.exact(result)}
        ids = numpy.array(subject.ids, numpy.int32)
        return Response(arrays.npz({"states": result, "token_ids": ids}, meta), content_type=NPZ)

"""/inspect/runs: answers that are kept with all that was noted of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import flask
from flask import Response, request
from marshmallow import ValidationError

from transformers_api.api.http import inspect_auth, strict_json
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import run_page, subjects
from transformers_api.api.inspect.schemas.runs import (
    ComparedRuns,
    Replayed,
    RunDeleted,
    RunList,
    RunRequest,
    StoredRun,
)
from transformers_api.api.intervene.schema import ComparedInterveneOptions
from transformers_api.api.openai import requests
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import InvalidRequest
from transformers_api.serving.generation import GenerationRequest, collect
from transformers_api.serving.inspect import run_file, run_params
from transformers_api.serving.inspect.edit_request import InterveneRequest
from transformers_api.serving.inspect.run_compare import compare
from transformers_api.serving.inspect.run_file import Run
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.chat_template import ChatPrompt
from transformers_api.serving.text.spans import Span, spans

blueprint = Blueprint("runs", __name__, dialect=NIELS, description="Answers that are kept")

NPZ, LINES, HTML = "application/x-npz", "application/jsonl", "text/html"
FORMATS = ("jsonl", "npz", "html")
_FILE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string"}
_EXAMPLE = {"prompt": "The capital of France is", "max_tokens": 3}


@blueprint.at("/inspect/runs", methods=["POST"])
@blueprint.takes(RunRequest, example=_EXAMPLE)
@blueprint.gives(StoredRun, 201, description="It is kept")
@blueprint.gives(Failed, 413, description="Too much text, too many tokens or too many numbers")
def create_run(body: dict[str, Any]) -> Any:
    """Write an answer and keep it: tokens, traces, edits, activations in the stream's own bits."""
    inspect_auth.check()
    services().runs.check(0, "store")
    with RequestContext(services()) as context:
        model = context.lease(body.get("model"), is_chat="messages" in body)
        subjects.inspector_of(model)
        generation = context.start(model, _requested(model, body), is_streamed=True)
        collect(generation)
        (run,) = context.recorded(generation)
        size = services().runs.put(context.client, run)
        return _described(run.meta, size), 201


def _requested(model: LoadedModel, body: Mapping[str, Any]) -> GenerationRequest:
    settings, messages = services().settings, body.get("messages", ())
    if messages:
        prompt = chat_template.encode(model, messages, max_bytes=settings.inspected_prompt_bytes)
    elif "prompt" in body:
        prompt = ChatPrompt(subjects.text_ids(model, body["prompt"], settings, "prompt"))
    else:
        requests.check_ids(model, body["token_ids"], "token_ids")
        prompt = ChatPrompt(list(body["token_ids"]))
    count, window = len(prompt.ids), model.engine.max_model_len
    subjects.check_tokens(count + body["max_tokens"], settings.inspect_max_tokens)
    requests.fit(body["max_tokens"], count, window, explicit=True, param="prompt")
    params = SamplingParams(
        max_tokens=body["max_tokens"],
        temperature=body["temperature"],
        top_k=max(body["top_k"], 0),
        top_p=body["top_p"],
        seed=body.get("seed"),
        stop_token_ids=prompt.stop_token_ids,
    )
    written = GenerationRequest(
        [prompt.ids],
        params,
        stop=(*prompt.stop, *body["stop"]),
        intervene=body.get("intervene"),
        spans=lambda: spans(model, messages, prompt.ids) if messages else (),
    )
    trace: TraceRequest = replace(body.get("trace") or TraceRequest(), store=True, required=True)
    return requests.with_trace(written, model, {"trace": trace, "stream": True}, settings)


@blueprint.at("/inspect/runs")
@blueprint.gives(RunList)
def list_runs() -> Any:
    """List the runs of this key, the newest first."""
    inspect_auth.check_enabled()
    runs = services().runs.of(flask.g.client)
    return {"object": "list", "data": [_described(meta, size) for meta, size in runs]}


@blueprint.at("/inspect/runs/<run_id>")
@blueprint.gives(_TEXT, content_type=LINES)
@blueprint.gives(_FILE, content_type=NPZ)
@blueprint.gives(_FILE, content_type=HTML)
@blueprint.gives(Failed, 404, description="No run of this id")
def get_run(run_id: str) -> Any:
    """Give a run as JSON lines; with `?format=` `npz` or `html` as a file.

    The first line is about the run, each other one about a token. The archive has the activations
    too, in the stream's own bits; the page needs no server.
    """
    inspect_auth.check_enabled()
    form = request.args.get("format", "jsonl")
    if form not in FORMATS:
        raise InvalidRequest(f"format must be one of: {', '.join(FORMATS)}", param="format")
    run = services().runs.get(flask.g.client, run_id)
    if form == "npz":
        return Response(run_file.write(run), content_type=NPZ)
    if form == "html":
        response = Response(run_page.render(run), content_type=f"{HTML}; charset=utf-8")
        response.headers["Content-Security-Policy"] = run_page.PAGE.policy
        return response
    return Response(b"".join(_lines(run)), content_type=LINES)


def _lines(run: Run) -> Iterator[bytes]:
    for each in (run.meta, *run.steps):
        yield strict_json.dump(each) + b"\n"


@blueprint.at("/inspect/runs/<run_id>", methods=["DELETE"])
@blueprint.gives(RunDeleted)
@blueprint.gives(Failed, 404, description="No run of this id")
def delete_run(run_id: str) -> Any:
    """Forget a run."""
    inspect_auth.check_enabled()
    services().runs.delete(flask.g.client, run_id)
    return {"id": run_id, "deleted": True}


@blueprint.at("/inspect/runs/<run_id>/replay", methods=["POST"])
@blueprint.gives(Replayed)
@blueprint.gives(Failed, 404, description="No run of this id, or a vector of its edits is gone")
def replay_run(run_id: str) -> Any:
    """Write a run again, with the same parameters, seed and edits, and say whether it is the same.

    Vectors are looked up by their names again.
    """
    inspect_auth.check()
    run = services().runs.get(flask.g.client, run_id)
    if not run.can_replay:
        raise InvalidRequest(f"run '{run_id}' was written in a form, which is not kept with it")
    intervene: InterveneRequest | None = None
    if run.intervene is not None:
        try:
            options: InterveneRequest = ComparedInterveneOptions().load(run.intervene)
        except ValidationError:  # another version of this server took it, or the file is damaged
            raise InvalidRequest(
                f"the edits of run '{run_id}' are none that this server knows"
            ) from None
        intervene = replace(options, compares=False, store=False)
    with RequestContext(services()) as context:
        model = context.lease(run.model)
        requests.check_ids(model, run.prompt_ids, "run")  # it may be another model by now
        again = GenerationRequest(
            [run.prompt_ids],
            run_params.from_json(run.params),
            stop=tuple(run.stop),
            intervene=intervene,
            spans=lambda: [Span(**each) for each in run.spans],
        )
        (choice,) = collect(context.start(model, again, is_streamed=False))
        difference = _first_difference(model, run.token_ids, choice.token_ids)
        return {
            "id": run_id,
            "identical": difference is None,
            "same_weights": model.fingerprint == run.fingerprint,
            "tokens": len(choice.token_ids),
            "first_difference": difference,
        }


def _first_difference(
    model: LoadedModel, before: Sequence[int], after: Sequence[int]
) -> dict[str, Any] | None:
    decoded = model.vocabulary.decoded
    for step, (one, other) in enumerate(zip_longest(before, after)):
        if one != other:
            return {
                "step": step,
                "token_id": one,
                "token": None if one is None else decoded(one),
                "other_id": other,
                "other": None if other is None else decoded(other),
            }
    return None


@blueprint.at("/inspect/runs/compare")
@blueprint.gives(ComparedRuns)
@blueprint.gives(Failed, 404, description="No run of one of these ids")
def compare_runs() -> Any:
    """Put two runs side by side: `?a=&b=`.

    `kl_at_least` is the divergence over the tokens that were noted of both and the rest as one: the
    whole one cannot be less. Activations are aligned where the answers begin.
    """
    inspect_auth.check_enabled()
    sides = []
    for name in ("a", "b"):
        if not request.args.get(name):
            raise InvalidRequest(f"{name} is required: the id of a run", param=name)
        sides.append(services().runs.get(flask.g.client, request.args[name]))
    return compare(sides[0], sides[1], services().settings.inspect_max_json_cells)


def _described(meta: Mapping[str, Any], size: int) -> dict[str, Any]:
    same = ("id", "created", "model", "text", "finish_reason", "params", "intervene", "can_replay")
    return {
        **{name: meta[name] for name in (*same, "activations")},
        "prompt_tokens": len(meta["prompt_ids"]),
        "completion_tokens": len(meta["token_ids"]),
        "bytes": size,
    }

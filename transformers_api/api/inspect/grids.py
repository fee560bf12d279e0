"""POST /inspect/patch and /inspect/ablate: every place of a model changed by turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from flask import Response, request

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.auth import View
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import grid_answer, subjects
from transformers_api.api.inspect.grid_answer import Form, GridAnswer
from transformers_api.api.inspect.jobs import started
from transformers_api.api.inspect.schemas.grids import (
    AblateRequest,
    AblationGrid,
    PatchGrid,
    PatchRequest,
)
from transformers_api.api.inspect.schemas.jobs import StartedJob
from transformers_api.api.inspect.subjects import Subject, opened
from transformers_api.errors import InvalidRequest, ModelNotCapable, ResponseTooLarge
from transformers_api.inspection import questions
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.grid_question import Cell, Grid, GridQuestion, Noise
from transformers_api.inspection.questions import Question
from transformers_api.serving.inspect.edit_positions import PromptPlaces, resolve
from transformers_api.serving.inspect.grid_job import GridWork
from transformers_api.serving.inspect.jobs import InspectionJob
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint("grids", __name__, dialect=NIELS, description="Every place by turns")

_FILE = {"type": "string", "format": "binary"}
_BY_TYPE: Mapping[str, Form] = {
    "application/json": "json",
    "application/x-npz": "npz",
    "image/png": "png",
    "text/html": "html",
}
_PAIR = {"clean": "The capital of France is", "corrupt": "The capital of Italy is", "layers": [0]}


def _in_any_form(view: View) -> View:
    """Document what `Accept` may ask for beside JSON."""
    for content_type in reversed([*_BY_TYPE][1:]):
        view = blueprint.gives(_FILE, content_type=content_type)(view)
    return view


@blueprint.at("/inspect/patch", methods=["POST"])
@blueprint.takes(PatchRequest, example=_PAIR)
@_in_any_form
@blueprint.gives(PatchGrid)
@blueprint.gives(StartedJob, 202, description="With `job`: it goes on by itself")
@blueprint.gives(Failed, 413, description="Too much text, or a grid that would take too long")
def patch(body: dict[str, Any]) -> Any:
    """Put numbers of the clean prompt into the corrupt one, one place at a time.

    0 is the corrupt prompt's metric, 1 the clean one's: where the grid is near 1 lies what makes
    the difference. The corrupt prompt may be the clean one with noise on the embeddings of a span.
    A grid that would take too long is refused once that is clear, unless it is a `job`. With
    `intervene` both prompts are read with the same edits.
    """
    inspect_auth.check()
    with RequestContext(services()) as context:
        model = context.lease(body.get("model"), is_chat=isinstance(body["clean"], list))
        inspector = subjects.inspector_of(model)
        clean = subjects.side_ids(model, body["clean"], "clean")
        corrupt = body["corrupt"]
        is_noise = isinstance(corrupt, dict)
        ids = clean if is_noise else subjects.side_ids(model, corrupt, "corrupt")
        subject, donor = (
            _side(context, model, body, which, own)
            for which, own in (("clean" if is_noise else "corrupt", ids), ("clean", clean))
        )
        layers = _layers(body, inspector.anatomy)
        columns: Sequence[int] = ()
        if body["part"] == "head":
            cells = _by_head(inspector.anatomy, layers)
        else:
            columns = subjects.positions(body["positions"], len(ids))
            cells = [Cell(layer, position) for layer in layers for position in columns]
        noise = _noise(subject, corrupt) if is_noise else None
        return _answered(subject, body, cells, layers, columns, donor=donor, noise=noise)


@blueprint.at("/inspect/ablate", methods=["POST"])
@blueprint.takes(AblateRequest, example={"prompt": "The capital of France is", "layers": [0]})
@_in_any_form
@blueprint.gives(AblationGrid)
@blueprint.gives(StartedJob, 202, description="With `job`: it goes on by itself")
@blueprint.gives(Failed, 413, description="Too much text, or a grid that would take too long")
def ablate(body: dict[str, Any]) -> Any:
    """Set each head, attention or MLP to zero by turns, and say how much it is missed.

    The number is the metric as it is less the metric without the part. One that is hardly missed
    may still matter: another can have done its work. With `intervene` it is that of the edited
    model, and parts are set to zero after the edits.
    """
    with opened(body) as subject:
        layers = _layers(body, subject.anatomy)
        part: Literal["attn", "mlp", "head"] = body["part"]
        cells = (
            _by_head(subject.anatomy, layers)
            if part == "head"
            else [Cell(layer) for layer in layers]
        )
        return _answered(subject, body, cells, layers, ())


def _side(
    context: RequestContext, model: LoadedModel, body: Mapping[str, Any], name: str, ids: list[int]
) -> Subject:
    """One of the two prompts, with the edits that were asked for."""
    return Subject(
        context=context,
        model=model,
        inspector=subjects.inspector_of(model),
        ids=ids,
        messages=body[name] if isinstance(body[name], list) else (),
        intervene=body.get("intervene"),
    ).edited(None)


def _layers(body: Mapping[str, Any], anatomy: Anatomy) -> list[int]:
    layers = subjects.layers(body["layers"], anatomy)
    if isinstance(body["layers"], list) and -1 in layers:
        raise InvalidRequest(f"layers must be in [0, {anatomy.layers - 1}]", param="layers")
    return sorted({layer for layer in layers if layer >= 0})


def _by_head(anatomy: Anatomy, layers: Sequence[int]) -> list[Cell]:
    return [
        Cell(layer, head=head) for layer in layers for head in range(anatomy.attention[layer].heads)
    ]


def _noise(subject: Subject, corrupt: Mapping[str, Any]) -> Noise:
    """The noise on the embeddings of a part of the clean prompt. Raises InvalidRequest."""
    place = PromptPlaces(
        ids=subject.ids,
        most=len(subject.ids),
        vocabulary=subject.model.vocabulary,
        spans=list,
        window=None,
        prompt_tokens=None,
    )
    ranges = resolve(corrupt["span"], place, "corrupt.span")
    count = len(subject.ids)
    positions = sorted(
        {at for start, stop in ranges for at in range(start, count if stop is None else stop)}
    )
    return Noise(
        size=corrupt["noise"],
        positions=positions,
        samples=corrupt["samples"],
        seed=corrupt["seed"],
    )


def _answered(
    subject: Subject,
    body: Mapping[str, Any],
    cells: list[Cell],
    layers: Sequence[int],
    columns: Sequence[int],
    donor: Subject | None = None,
    noise: Noise | None = None,
) -> Any:
    for name in ("answer", "against"):
        if name in body:
            subjects.token(body[name], subject, name)
    if not cells:
        raise InvalidRequest("these layers have no heads", param="layers")
    settings, vocabulary = subject.settings, Vocabulary(subject.model.tokenizer)
    if len(cells) > settings.inspect_max_json_cells:
        raise ResponseTooLarge(
            f"A grid of {len(cells)} cells (max {settings.inspect_max_json_cells}); ask for fewer "
            "layers or positions"
        )
    question = GridQuestion(
        part=body["part"],
        cells=cells,
        donor=None if donor is None else donor.ids,
        donor_plan=None if donor is None else donor.plan,
        answer=body.get("answer"),
        against=body.get("against"),
        metric=body["metric"],
        noise=noise,
        method=body["method"],
        within_s=settings.inspect_timeout_s,
    )
    if question.method == "gradient":
        _check_gradients(subject, body)
    answer = GridAnswer.of(
        body, vocabulary, subject.ids, layers, columns, cells, is_patch=donor is not None
    ).beside(subject.edit_header)
    if body["job"]:
        return _job(subject, question, answer, vocabulary)
    grid = subject.ask(questions.Grid(subject.ids, question))
    return sent(answer.json(grid, grid.values, vocabulary), _form(body))


def _check_gradients(subject: Subject, body: Mapping[str, Any]) -> None:
    if body["job"]:
        raise InvalidRequest('method "gradient" takes one pass: it is no job', param="job")
    inspections, cancellation = services().inspections, subject.context.cancellation
    if not inspections.has_gradients(subject.model, subject.inspector, cancellation):
        raise ModelNotCapable(
            f"model type {subject.anatomy.model_type} has no gradients", param="method"
        )


def _job(
    subject: Subject, question: GridQuestion, answer: GridAnswer, vocabulary: Vocabulary
) -> Any:
    """Begin a job, once its first cells are there: they say how long it will take."""
    jobs, inspections = services().jobs, services().inspections
    owner = subject.context.client
    jobs.check_room(owner)
    work = GridWork.begin(subject.ids, question, subject.ask)
    job = InspectionJob(
        owner,
        "patch" if answer.is_patch else "ablate",
        total=len(question.cells),
        cells=len(question.cells),
        result=lambda: answer.json(work.first, work.values, vocabulary),
    )
    lease = subject.context.lease_for(subject.model, job.cancellation)

    def ask(question: Question[Grid]) -> Grid:
        return inspections.ask(lease.model, subject.of_edited(question), job.cancellation)

    def is_busy() -> bool:
        return lease.model.engine.stats().running > 0

    jobs.start(job, partial(work.run, job, ask, is_busy), lease.release)
    return started(job, work.estimate_s)


def _form(body: Mapping[str, Any]) -> Form:
    """The form that `format` says, else the one that the client accepts."""
    if "format" in body:
        form: Form = body["format"]
        return form
    return _BY_TYPE[request.accept_mimetypes.best_match(_BY_TYPE, "application/json")]


def sent(answer: dict[str, Any], form: Form) -> Any:
    """An answer in a form."""
    if form == "json":
        return answer
    data, content_type = grid_answer.file(answer, form)
    response = Response(data, content_type=content_type)
    if form == "html":
        response.headers["Content-Security-Policy"] = grid_answer.POLICY
    return response

"""/inspect/jobs: inspections that go on by themselves, their progress and results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flask
from flask import Response, request

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import Formatter, RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import grid_answer
from transformers_api.api.inspect.grid_answer import Form
from transformers_api.api.inspect.schemas.jobs import JobDeleted, JobList, JobResult
from transformers_api.errors import InvalidRequest
from transformers_api.serving.generation import Generation
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.jobs import InspectionJob
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.text.choice_text import TextDelta

blueprint = Blueprint("jobs", __name__, dialect=NIELS, description="Inspections that take long")

_FORMS: tuple[Form, ...] = ("json", "npz", "png", "html")
_FILE = {"type": "string", "format": "binary"}
_GRIDS = ("patch", "ablate")
QUIET_S = 1.0  # between two events that say that nothing has happened


def started(job: InspectionJob, estimate_s: float) -> Any:
    """The answer to a request that has begun a job."""
    answer = {"id": job.id, "estimate_s": arrays.digits(estimate_s), "cells": job.cells}
    return answer, 202, {"Location": f"/inspect/jobs/{job.id}"}


@blueprint.at("/inspect/jobs")
@blueprint.gives(JobList)
def list_jobs() -> Any:
    """List the jobs of this key, the oldest first."""
    inspect_auth.check_enabled()
    return {"object": "list", "data": [_state(job) for job in services().jobs.of(flask.g.client)]}


@blueprint.at("/inspect/jobs/<job_id>")
@blueprint.gives(JobResult)
@blueprint.gives(_FILE, content_type="application/x-npz")
@blueprint.gives(_FILE, content_type="image/png")
@blueprint.gives(_FILE, content_type="text/html")
@blueprint.gives(Failed, 404, description="No such job of this key")
def get_job(job_id: str) -> Any:
    """Show a job and what there is of its result; of a grid `?format=npz`, `png` or `html`."""
    inspect_auth.check_enabled()
    job = services().jobs.get(flask.g.client, job_id)
    form = request.args.get("format", "json")
    if form not in _FORMS:
        raise InvalidRequest(f"format must be one of: {', '.join(_FORMS)}", param="format")
    if form == "json":
        return {**_state(job), "result": job.result()}
    if job.kind not in _GRIDS:
        raise InvalidRequest("only a grid has another format than json", param="format")
    data, content_type = grid_answer.file(job.result(), form)
    response = Response(data, content_type=content_type)
    if form == "html":
        response.headers["Content-Security-Policy"] = grid_answer.POLICY
    return response


@blueprint.at("/inspect/jobs/<job_id>", methods=["DELETE"])
@blueprint.gives(JobDeleted)
@blueprint.gives(Failed, 404, description="No such job of this key")
def delete_job(job_id: str) -> Any:
    """Cancel a job that runs, which keeps what is there of its result; forget one that ended."""
    inspect_auth.check_enabled()
    was_running = services().jobs.delete(flask.g.client, job_id)
    return {"id": job_id, "cancelled": was_running, "deleted": not was_running}


@blueprint.at("/inspect/jobs/<job_id>/events")
@blueprint.gives(_FILE, content_type="text/event-stream")
@blueprint.gives(Failed, 404, description="No such job of this key")
def job_events(job_id: str) -> Any:
    """Stream `progress` whenever there is some, and in the end exactly one `end`.

    Both have the job without its result. Whoever leaves does not end the job.
    """
    inspect_auth.check_enabled()
    job = services().jobs.get(flask.g.client, job_id)
    with RequestContext(services()) as context:
        context.take_place()
        context.cancellation.on_cancel(job.wake)
        return context.stream(JobEvents(job, context.cancellation), None)


class JobEvents(Formatter):
    """The events of a job. The client's leaving ends them, and nothing else."""

    dialect = NIELS

    def __init__(self, job: InspectionJob, cancellation: Cancellation) -> None:
        self._job = job
        self._cancellation = cancellation

    def whole(self, generation: Generation) -> Any:
        """The last event."""
        return _state(self._job)

    def opening(self) -> Iterator[bytes]:
        """The progress, until it has ended."""
        done = -1
        while self._job.is_running:
            self._cancellation.check()
            if self._job.done != done:
                done = self._job.done
                yield self.dialect.frame(_state(self._job), "progress")
            else:
                yield self.dialect.ping
            self._job.wait(done, QUIET_S, lambda: self._cancellation.is_cancelled)

    def frames(self, delta: TextDelta) -> Iterator[bytes]:
        """None: nothing is generated."""
        return iter(())

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The end."""
        yield self.dialect.frame(_state(self._job), "end")


def _state(job: InspectionJob) -> dict[str, Any]:
    left_s, error = job.left_s, job.error
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "done": job.done,
        "total": job.total,
        "seconds": arrays.digits(job.seconds),
        "left_s": None if left_s is None else arrays.digits(left_s),
        "created": job.created,
        "error": None if error is None else {"error": error.message, "code": error.code},
    }

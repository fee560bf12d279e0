"""The end of every request, once its last byte is out: a line of log, and the metrics.

Streams end here too, whoever ended them.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

import flask

from transformers_api import logs
from transformers_api.api.http import dialects
from transformers_api.api.http.request_record import RequestRecord
from transformers_api.api.http.services import services
from transformers_api.errors import ApiError

log = logging.getLogger(__name__)
# Asked every few seconds, or thirty at once.
QUIET = ("/health", "/healthz", "/readyz", "/metrics", "/ui/<version>/<path:name>")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def begin() -> None:
    """Give this request its id, and open its record."""
    flask.g.request_id = id_for(flask.request.headers.get("X-Request-Id", ""))
    logs.request_id.set(flask.g.request_id)  # each request runs on one thread
    _open_record()


def id_for(requested: str) -> str:
    """The id that a client asks for where it may have it, else a new one."""
    return requested if _REQUEST_ID.fullmatch(requested) else uuid.uuid4().hex


def _open_record() -> None:
    request = flask.request
    rule = request.url_rule
    flask.g.record = RequestRecord(
        method=request.method, path=request.path, route=rule.rule if rule else "none"
    )


def current() -> RequestRecord:
    """The record of the request that this thread is working on."""
    if "record" not in flask.g:  # a malformed request may fail before it is opened
        _open_record()
    record: RequestRecord = flask.g.record
    return record


def note_error(error: ApiError) -> None:
    """Note the error that this request is answered with."""
    current().note_error(error)


def finish(response: flask.Response) -> flask.Response:
    """Name the request in its answer; log and count it when that has been sent, or given up."""
    record, metrics = current(), services().metrics
    # A malformed request may fail before it has an id.
    own_id = flask.g.get("request_id") or uuid.uuid4().hex
    for header in ("X-Request-Id", *dialects.by_path(flask.request.path).id_headers):
        response.headers[header] = own_id
    spent_s = time.monotonic() - record.began
    response.headers["OpenAI-Processing-Ms"] = str(round(1000 * spent_s))
    record.status = response.status_code
    record.client = flask.g.get("client")

    def end() -> None:
        record.seconds = time.monotonic() - record.began
        _log(record)
        if metrics is not None:
            metrics.on_request(record)

    # A file is sent by the server itself, which does not close the response.
    if response.direct_passthrough:
        end()
    else:
        response.call_on_close(end)
    return response


def _log(record: RequestRecord) -> None:
    level = logging.DEBUG if record.route in QUIET else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "request", extra={"fields": record.fields()})

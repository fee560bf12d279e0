"""/inspect/jobs."""

from __future__ import annotations

from marshmallow import fields

from transformers_api.api.http.fields import AnyObject, Boolean, Integer, Many, Number, Object, Text
from transformers_api.api.http.fields import Schema as Plain
from transformers_api.api.http.sampling_schema import about

_MANY = 1 << 31
STATES = ("running", "done", "cancelled", "failed")


def is_job() -> Boolean:
    """The field that asks for a job."""
    return Boolean(
        load_default=False,
        **about("Answer 202 with an id, and go on; see [jobs](#inspectjobs)."),
    )


class StartedJob(Plain):
    """A job that has begun."""

    id = Text()
    estimate_s = Number(0, 1e9, **about("The time that it may take, at the rate of its beginning."))
    cells = Integer(0, _MANY, **about("Numbers of its result."))


class JobState(Plain):
    """A job without its result."""

    id = Text()
    kind = Text(**about("Such as `patch`."))
    state = Text(choices=STATES)
    done = Integer(0, _MANY)
    total = Integer(0, _MANY, **about("Steps: of a grid its cells, of a derivation its texts."))
    seconds = Number(0, 1e9, **about("That it has taken."))
    left_s = fields.Raw(**about("Seconds that the rest may take; null where nothing is known."))
    created = Integer(0, _MANY)
    error = AnyObject(allow_none=True, **about("`error` and `code`, where it did not end well."))


class JobResult(JobState):
    """A job."""

    result = AnyObject(**about("As the route would have answered; what is not there yet is null."))


class JobList(Plain):
    """The jobs of this key."""

    object = Text()
    data = Many(Object(JobState), longest=_MANY)


class JobDeleted(Plain):
    """A job was cancelled, which keeps what is there of its result, or was forgotten."""

    id = Text()
    cancelled = Boolean()
    deleted = Boolean()

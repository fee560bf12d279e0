"""GET /health, /healthz, /readyz and /."""

from __future__ import annotations

from transformers_api.api.http.fields import AnyObject, Boolean, Integer, Many, Schema, Text
from transformers_api.api.http.sampling_schema import about

_MANY = 1 << 20


class Health(Schema):
    """The health of the server, in the words of all its predecessors."""

    status = Text(required=True, choices=("healthy", "degraded"))
    ok = Boolean()
    model_ready = Boolean()
    model_loaded = Boolean()
    current_model = Text(allow_none=True)
    models_loaded = Many(Text(), longest=_MANY)
    loaded_models = Integer(0, _MANY)
    active_requests = Integer(0, _MANY)
    total_models = Integer(0, _MANY)
    cuda_available = Boolean()
    device = Text(allow_none=True, **about("Of the model in memory, or null."))
    cache_dir = Text(allow_none=True, **about("Always null: `check` names the server's folders."))
    memory = AnyObject(**about("`process_bytes` (null where unknown) and `model_bytes`."))
    system = AnyObject(**about("`platform`, `python` and `cpu_count`."))
    uptime = Text()


class Probe(Schema):
    """The process answers."""

    status = Text(required=True, choices=("ok",))


class Ready(Schema):
    """Readiness for requests."""

    status = Text(required=True, choices=("ready", "not ready"))
    reason = Text(required=True)


class Start(Schema):
    """The name of this server, and where to go on."""

    name = Text(required=True)
    message = Text()
    status = Text()
    version = Text(required=True)
    documentation = Text()
    health = Text()
    endpoints = AnyObject()


class Version(Schema):
    """The version of this server."""

    version = Text(required=True)

"""GET /status."""

from __future__ import annotations

from marshmallow import Schema, fields


class KvCache(Schema):
    """Memory for keys and values."""

    bytes = fields.Integer(metadata={"description": "Allocated."})
    used_bytes = fields.Integer(metadata={"description": "Reserved for the sequences that run."})
    budget_bytes = fields.Integer(metadata={"description": "May be allocated."})
    token_bytes = fields.Integer(
        metadata={"description": "Of a token's keys and values, in all layers: see KV_CACHE_DTYPE."}
    )
    usage = fields.Float(metadata={"description": "Reserved share of the budget, 0 to 1."})


class Adapter(Schema):
    """An adapter in memory beside its base."""

    model = fields.String()
    bytes = fields.Integer(metadata={"description": "Of its numbers."})
    leases = fields.Integer(metadata={"description": "Requests that hold it."})


class Resident(Schema):
    """The model in memory."""

    model = fields.String()
    draining = fields.Boolean(metadata={"description": "On its way out: grants no leases."})
    since = fields.Integer(metadata={"description": "Seconds since 1970."})
    load_s = fields.Float(metadata={"description": "Seconds that its loading took."})
    bytes = fields.Integer(metadata={"description": "Of its weights."})
    dtype = fields.String()
    quantization = fields.String(
        metadata={"description": "none, int8, int4, or the format that its files have, as gptq."}
    )
    weights = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        metadata={"description": "Of a GGUF file: what is kept of each of its types."},
    )
    kernels = fields.String(metadata={"description": "native or torch: whose run it."})
    isa = fields.String(metadata={"description": "The instruction set of native kernels, or ''."})
    device = fields.String()
    max_model_len = fields.Integer()
    mode = fields.String(metadata={"description": "batching, or sequential: one at a time."})
    adapters = fields.List(
        fields.Nested(Adapter), metadata={"description": "Beside it, the one used last at the end."}
    )
    leases = fields.Integer(metadata={"description": "Requests that hold it."})
    running = fields.Integer(metadata={"description": "Sequences that have a slot."})
    waiting = fields.Integer(metadata={"description": "Sequences that wait for a slot."})
    prompt_tokens = fields.Integer(metadata={"description": "Read since it was loaded."})
    generated_tokens = fields.Integer(metadata={"description": "Written since it was loaded."})
    kv_cache = fields.Nested(KvCache)


class Loading(Schema):
    """The model that comes next."""

    model = fields.String()
    progress = fields.Float(metadata={"description": "0 to 1."})
    doing = fields.String(metadata={"description": "What is being done, in words."})
    stage = fields.String(
        metadata={
            "description": "preparing (files come or are converted), waiting (its turn), loading."
        }
    )
    since = fields.Float(metadata={"description": "When it was asked for; seconds since 1970."})
    last_load_s = fields.Float(
        allow_none=True, metadata={"description": "Seconds that its last load took."}
    )


class Swap(Schema):
    """One change of what is in memory, or an attempt."""

    model = fields.String()
    outcome = fields.String(metadata={"description": "loaded, failed or unloaded."})
    at = fields.Float(metadata={"description": "When it was over; seconds since 1970."})
    load_s = fields.Float(allow_none=True, metadata={"description": "Seconds that loading took."})
    evicted = fields.String(
        allow_none=True, metadata={"description": "The model that made way for it."}
    )
    error = fields.String(allow_none=True)


class Memory(Schema):
    """Main memory; GPUs have their own."""

    process_bytes = fields.Integer(
        allow_none=True, metadata={"description": "Of this process, in RAM."}
    )
    machine_bytes = fields.Integer(metadata={"description": "Of the machine, or of its cgroup."})
    free_bytes = fields.Integer(metadata={"description": "That can be had."})


class Limits(Schema):
    """The limits of the server; null is no limit."""

    max_inflight = fields.Integer()
    max_queue = fields.Integer()
    threads = fields.Integer()
    max_prompt_bytes = fields.Integer()
    max_body_bytes = fields.Integer()
    request_timeout_s = fields.Float(allow_none=True)
    rate_limit_per_min = fields.Integer(allow_none=True)
    inspections_per_min = fields.Integer(
        allow_none=True, metadata={"description": "Of who asks, on /chat/stream and /inspect/*."}
    )
    rate_limit_burst = fields.Integer()
    rate_limit_tokens_per_min = fields.Integer(allow_none=True)


class ReplicaState(Schema):
    """One replica of the engine, as it was a second ago."""

    replica = fields.String(metadata={"description": "Its name, also a label of its metrics."})
    machine = fields.String()
    pid = fields.Integer()
    ready = fields.Boolean()
    reason = fields.String(metadata={"description": "Why not."})
    state = fields.String(metadata={"description": "empty, loading, ready, draining."})
    model = fields.String(allow_none=True)
    adapters = fields.List(fields.String())
    loading = fields.String(allow_none=True)
    requests = fields.Integer(metadata={"description": "Streams that it writes."})
    leases = fields.Integer()
    running = fields.Integer()
    waiting = fields.Integer()
    queued = fields.Dict(keys=fields.String(), values=fields.Integer())
    swaps = fields.Integer(metadata={"description": "The last 32 at most."})
    generated_tokens = fields.Integer()
    process_bytes = fields.Integer(allow_none=True)


class Status(Schema):
    """The state of the server."""

    version = fields.String()
    uptime_s = fields.Float()
    started = fields.Integer(metadata={"description": "Seconds since 1970."})
    ready = fields.Boolean(metadata={"description": "Whether requests may be sent."})
    reason = fields.String(metadata={"description": "Why not."})
    state = fields.String(metadata={"description": "empty, loading, ready, draining."})
    resident = fields.Nested(Resident, allow_none=True)
    encoder = fields.String(
        allow_none=True, metadata={"description": "The encoder of embeddings beside it."}
    )
    loading = fields.Nested(Loading, allow_none=True)
    swaps = fields.List(
        fields.Nested(Swap), metadata={"description": "The last 32, the newest at the end."}
    )
    queued = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": "Requests that wait for a model, by its name."},
    )
    failed = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        metadata={"description": "Why models could not be loaded, until they are."},
    )
    requests = fields.Integer(metadata={"description": "Requests that are being served or wait."})
    memory = fields.Nested(Memory)
    limits = fields.Nested(Limits)
    engine = fields.String(metadata={"description": "local, ray or openai."})
    replicas = fields.List(
        fields.Nested(ReplicaState), metadata={"description": "Of ENGINE=ray; else empty."}
    )

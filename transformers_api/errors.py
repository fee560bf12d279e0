"""Every error that a client may see.

::

    ApiError
    ├── InvalidRequest           400  a field is wrong; ``param`` names it
    │   └── ModelNotCapable      400  the model cannot do this; AttentionUnavailable
    ├── InvalidApiKey, InsufficientPermissions  401, 403
    ├── NotFound                 404  no such route or object: ModelNotFound, UnknownCompletion
    ├── RequestTimeout, SlowReader, PayloadTooLarge  408, 408, 413
    ├── NotOffered               501  another server's route, which nothing here does
    ├── Overloaded               429  the queue is full: RateLimited, TraceBusy, UpstreamBusy, …
    ├── Unavailable              503  cannot serve now, may later: ModelLoading, ReplicaFailed, …
    │   └── ModelLoadFailed      503  InsufficientMemory; ModelNotServable, which is 400
    ├── InsufficientStorage      507  no room on the disk for the model
    ├── UpstreamFailed           502  another server, which answers for this one
    ├── DeadlineExceeded         504  InspectionTimeout, UpstreamTimeout
    ├── ClientGone               499  nobody reads this any more
    └── EngineFailed             500  our fault; the log has the trace
        └── EngineDead           503  the engine thread has ended; restart the process

Any layer may raise them; only ``api/http/errors.py`` renders them.
"""

from __future__ import annotations

from typing import ClassVar


class ApiError(Exception):
    """An error with all that a response needs: status, OpenAI ``type``, ``code``, ``param``."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        # What a client sent may be repeated in it: of any length, with halves of surrogate pairs.
        self.message = message[:4096].encode("utf-8", "replace").decode()
        super().__init__(self.message)
        self.param = param
        self.retry_after = retry_after  # seconds, 1..120


class InvalidRequest(ApiError):
    """The request is wrong; sending it again will not help."""

    status = 400
    type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A known parameter that this server does not support and that would change the answer."""

    code = "unsupported_parameter"


class ThreadUnsupported(UnsupportedParameter):
    """A conversation that the server was to hold; Anthropic's clients then send the whole of it."""

    code = "thread_unsupported_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and completion together do not fit the model's context."""

    code = "context_length_exceeded"


class ConstraintRefused(InvalidRequest):
    """The requested format cannot be enforced, is too large, or allows no answer."""


class ConstraintFailed(InvalidRequest):
    """Nothing that the requested format allows can follow, or it is too complex to work out."""

    code = "constraint_failed"


class PreviousResponseNotFound(InvalidRequest):
    """The response that this one was to go on from is not stored, or not any more."""

    code = "previous_response_not_found"


class TooManyTokens(InvalidRequest):
    """One request may take more tokens than a client has in a minute; waiting will not help."""

    code = "too_many_tokens"


class ModelNotCapable(InvalidRequest):
    """The model exists but cannot do what was asked."""

    code = "model_not_capable"


class AttentionUnavailable(ModelNotCapable):
    """The model, or the layer asked for, has no attention weights to show."""

    code = "attention_unavailable"


class InvalidApiKey(ApiError):
    """The request has no API key, or one that is not valid."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class InsufficientPermissions(ApiError):
    """The API key is valid and may not do this."""

    status = 403
    type = "invalid_request_error"
    code = "insufficient_permissions"


class InspectionDisabled(InsufficientPermissions):
    """INSPECT_ENABLED is off."""

    code = "inspect_disabled"

    def __init__(self) -> None:
        super().__init__("Inspection is disabled on this server")


class PayloadTooLarge(ApiError):
    """The body or the prompt has too many bytes."""

    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class PromptTooLarge(PayloadTooLarge):
    """The prompt has more text or tokens than this route reads."""

    code = "prompt_too_large"


class ResponseTooLarge(PayloadTooLarge):
    """The answer would have more numbers than this route sends."""

    code = "response_too_large"


class NotFound(ApiError):
    """No such route or object."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """The registry does not know this id."""

    type = "model_not_found"
    code = "model_not_found"

    def __init__(self, model: str, *, param: str | None = "model") -> None:
        super().__init__(f"Model '{model}' not found", param=param)


class UnknownCompletion(NotFound):
    """The server has forgotten this completion, or never made it."""

    code = "unknown_completion"


class MethodNotAllowed(ApiError):
    """The route exists, but not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ApiError):
    """The client took longer than RECEIVE_TIMEOUT_S to send its request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class SlowReader(ApiError):
    """The client does not read its answer as fast as it is made."""

    status = 408
    type = "invalid_request_error"
    code = "slow_reader"


class UnsupportedEncoding(ApiError):
    """The body is compressed in a way that this server does not read."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_encoding"


class MisdirectedRequest(ApiError):
    """The Host header names another server; ALLOWED_HOSTS lists those that mean this one."""

    status = 421
    type = "invalid_request_error"
    code = "misdirected_request"


class UriTooLong(ApiError):
    """The first line of the request is too long."""

    status = 414
    type = "invalid_request_error"
    code = "uri_too_long"


class HeadersTooLarge(ApiError):
    """The request has too many headers, or too long ones."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class NotOffered(ApiError):
    """A route of another server's API that this one does not offer."""

    status = 501
    type = "not_implemented_error"
    code = "not_offered"


class ChatUnavailable(NotOffered):
    """The registry marks the model as completion-only (``chat: off``)."""

    code = "chat_completions_not_available"


class ConstraintsUnavailable(NotOffered):
    """The tokens of this model cannot be told as bytes, so its answers cannot be constrained."""

    code = "constraints_not_available"


class EmbeddingsUnavailable(NotOffered):
    """`ENABLE_EMBEDDINGS_BACKEND` is off."""

    code = "embeddings_backend_unavailable"


class Overloaded(ApiError):
    """Too much work is waiting already."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class RateLimited(Overloaded):
    """The client has asked more often than it may."""

    code = "rate_limited"


class TraceBusy(Overloaded):
    """As many requests wait to be traced as may."""

    code = "trace_busy"


class InspectionBusy(Overloaded):
    """As many inspections are waiting as may."""

    code = "inspect_busy"


class UpstreamBusy(Overloaded):
    """The server that answers for this model takes no more for now."""

    code = "upstream_busy"


class Unavailable(ApiError):
    """Cannot be served now."""

    status = 503
    code = "unavailable"


class ModelLoading(Unavailable):
    """The server is still starting."""

    code = "model_loading"


class ModelNotLoaded(Unavailable):
    """Another model (or none) is resident and AUTO_LOAD is off."""

    code = "model_not_loaded"

    def __init__(self, model: str) -> None:
        super().__init__(f"Model '{model}' is not loaded", param="model")


class ModelLoadFailed(Unavailable):
    """The model's files could not be found, checked, converted or loaded."""

    code = "model_load_failed"


class ModelNotServable(ModelLoadFailed):
    """The model is of a kind that this server can never serve, such as an encoder-decoder."""

    status = 400
    type = "invalid_request_error"
    code = "model_not_servable"


class InsufficientMemory(ModelLoadFailed):
    """The model does not fit; nothing was evicted for it."""

    code = "insufficient_memory"


class ModelUnloaded(Unavailable):
    """The model was taken away before the answer was complete."""

    code = "model_unloaded"


class ServerShuttingDown(Unavailable):
    """The process is ending."""

    code = "server_shutting_down"


class ReplicaFailed(Unavailable):
    """The replica that wrote this answer has ended; others go on."""

    code = "replica_failed"


class InsufficientStorage(ApiError):
    """No room on the disk for the model's files."""

    status = 507
    code = "insufficient_storage"


class UpstreamFailed(ApiError):
    """The server that answers for this model cannot be reached, or makes no sense."""

    status = 502
    code = "upstream_failed"


class DeadlineExceeded(ApiError):
    """The answer was not complete after REQUEST_TIMEOUT_S."""

    status = 504
    code = "deadline_exceeded"


class InspectionTimeout(DeadlineExceeded):
    """An inspection took longer than it may."""

    code = "inspect_timeout"


class UpstreamTimeout(DeadlineExceeded):
    """The server that answers for this model is silent."""

    code = "upstream_timeout"


class ClientGone(ApiError):
    """Whoever asked has left; rendered only into logs."""

    status = 499
    type = "invalid_request_error"
    code = "client_gone"


class EngineFailed(ApiError):
    """The engine could not finish a step, or the model gave no finite numbers; see the log."""

    code = "engine_failed"


class EngineDead(EngineFailed):
    """The engine thread has ended; the process must be restarted."""

    status = 503
    code = "engine_dead"

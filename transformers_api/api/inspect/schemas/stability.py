"""POST /inspect/stability."""

from __future__ import annotations

from transformers_api.api.http.fields import AnyObject, Integer, Many, Number, StrictSchema
from transformers_api.api.http.sampling_schema import about
from transformers_api.api.inspect.schemas.inspect import Inspected, whole

MOST_SAMPLES = 16
_MANY = 1 << 20


class StabilityRequest(Inspected):
    """Small pushes of the residual stream after one layer."""

    layer = whole(**about("After which layer; -1 is the embedding. Default: the middle one."))
    scale = Number(
        0,
        10,
        above=True,
        load_default=0.1,
        **about("Their length, in usual lengths of the stream."),
    )
    samples = Integer(1, MOST_SAMPLES, load_default=5, **about("So many random directions."))
    seed = Integer(0, 2**63 - 1, load_default=0, **about("Of these."))


class StableTokens(StrictSchema):
    """Tokens, and how far their predictions move."""

    layer = Integer(-1, _MANY)
    scale = Number(0, 10)
    samples = Integer(1, MOST_SAMPLES)
    tokens = Many(
        AnyObject(),
        longest=_MANY,
        **about("`position`, `token_id`, `token`, `kl_mean` and `kl_max` over the samples, nats."),
    )
    intervene = AnyObject()

"""The patience with a redis that does not answer, the same for all that is kept there."""

TIMEOUT_S = 0.25  # a request waits no longer for redis
TRY_AGAIN_S = 5.0

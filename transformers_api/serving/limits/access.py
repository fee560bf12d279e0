"""Who may use the server, and how much: what the settings make of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from transformers_api.config.settings import Settings
from transformers_api.serving.limits.api_keys import ApiKeys
from transformers_api.serving.limits.rate_limit import Limiter, RateLimiter

log = logging.getLogger(__name__)


def _unlimited() -> Limiter:
    return RateLimiter(0, 1)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Keys and limits; without any, everybody may do everything."""

    keys: ApiKeys | None = None  # None: nobody needs one
    inspections: Limiter = field(default_factory=_unlimited)  # of /chat/stream and /inspect/*
    requests: Limiter | None = None  # of everything else that is not only read
    tokens: Limiter | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> Access:
        """Raises SettingError for a file of keys that cannot be read."""
        keys = None if settings.api_keys_file is None else ApiKeys(settings.api_keys_file)
        if keys is None and not settings.listens_on_loopback:
            log.warning(
                "EVERYBODY who reaches %s:%d may use this server, load and unload models: "
                "set API_KEYS_FILE, or HOST=127.0.0.1",
                settings.host,
                settings.port,
            )
        make = _Maker(settings.redis_url)
        inspections = make("requests", settings.inspected_per_min, settings.rate_limit_burst)
        per_min = settings.rate_limit_tokens_per_min
        return cls(
            keys=keys,
            inspections=inspections,
            requests=inspections if settings.rate_limit_per_min else None,
            tokens=make("tokens", per_min, per_min) if per_min else None,
        )


class _Maker:
    """Limiters in redis, where one is named, else in this process."""

    def __init__(self, redis_url: str | None) -> None:
        self._store = None
        if redis_url is not None:
            from transformers_api.serving.limits.redis_rate_limit import Redis

            self._store = Redis(redis_url)

    def __call__(self, kind: str, per_min: int, burst: int) -> Limiter:
        if self._store is None:
            return RateLimiter(per_min, burst)
        from transformers_api.serving.limits.redis_rate_limit import SharedRateLimiter

        return SharedRateLimiter(self._store, kind, per_min, burst)

"""Access to the server: its keys and its rates, as the settings say."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass

from transformers_api.config.settings import SettingError, Settings
from transformers_api.serving.limits.api_keys import ApiKeys, KeyStore, reason
from transformers_api.serving.limits.key_file import KeyFile
from transformers_api.serving.limits.token_bucket import Rate

log = logging.getLogger(__name__)

_IPV6_NETWORK = 64  # bits: what one household or machine is assigned


@dataclass(frozen=True, kw_only=True)
class Access:
    """Keys and limits; without any, everybody may do everything."""

    keys: ApiKeys | None = None  # None: nobody needs one
    requests: Rate | None = None  # of a client, to /chat/stream and /inspect/*
    limits_all: bool = False  # `requests` holds for everything that is not only read
    spares_local: bool = False  # whoever sits at this machine may ask without a limit
    tokens: Rate | None = None  # of a client, in prompts and answers

    @classmethod
    def from_settings(cls, settings: Settings) -> Access:
        """Raises SettingError for a file of keys that cannot be read."""
        keys = _keys(settings)
        if keys is None and not settings.listens_on_loopback:
            log.warning(
                "EVERYBODY who reaches %s:%d may use this server, load and unload models: "
                "set API_KEYS_FILE or API_KEYS_REDIS, or HOST=127.0.0.1",
                settings.host,
                settings.port,
            )
        per_min, tokens = settings.inspected_per_min, settings.rate_limit_tokens_per_min
        return cls(
            keys=keys,
            requests=Rate(settings.rate_limit_burst, per_min) if per_min else None,
            limits_all=bool(settings.rate_limit_per_min),
            spares_local=_is_private(settings),
            tokens=Rate(tokens, tokens) if tokens else None,
        )


def key_store(settings: Settings) -> KeyStore | None:
    """The place of the keys; None where nobody needs one."""
    if settings.api_keys_file is not None:
        return KeyFile(settings.api_keys_file)
    if not settings.api_keys_redis:
        return None
    from transformers_api.serving.limits.key_redis import KeyRedis

    return KeyRedis(settings.redis_url or "")


def _keys(settings: Settings) -> ApiKeys | None:
    """Keys that redis has are waited for; a file that cannot be read will not mend itself."""
    store = key_store(settings)
    if store is None:
        return None
    keys = ApiKeys(store)
    try:
        if not keys.read():
            log.warning("%s has no API keys: every request is refused", store)
    except (OSError, ValueError) as error:
        if settings.api_keys_file is not None:
            text = f"API_KEYS_FILE={store} is not allowed: {reason(error)}"
            raise SettingError(text) from None
        log.error("Every request is refused until the API keys can be read: %s", reason(error))
    return keys


def _is_private(settings: Settings) -> bool:
    """True where the default limit has nobody to guard against: behind a proxy it has."""
    is_default = settings.rate_limit_per_min is None
    return is_default and settings.listens_on_loopback and not settings.trusted_proxies


def is_loopback(address: str) -> bool:
    """True for an address of this machine itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def network(address: str) -> str:
    """The client of an address: itself, of IPv6 its /64; other names stand for themselves."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a socket in the file system has none
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        prefix = int(parsed) >> (128 - _IPV6_NETWORK) << (128 - _IPV6_NETWORK)
        return f"{ipaddress.IPv6Address(prefix)}/{_IPV6_NETWORK}"
    return str(parsed)

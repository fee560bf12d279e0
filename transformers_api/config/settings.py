"""Every setting, and the one reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers_api.config.cluster_settings import ClusterSettings
from transformers_api.config.model_settings import ModelSettings
from transformers_api.config.server_settings import ServerSettings

GIB = 1 << 30
FRONT_REPLICAS = 8  # that one front has threads for; more fronts are for more


class SettingError(ValueError):
    """A setting has a value that it may not have; the message names setting, value and choices."""


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings, ClusterSettings, ServerSettings):
    """Every option. The environment name of a field is its name in upper case."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read every setting; the first bad value raises SettingError with one clear line.

        A setting's own name wins over its aliases; an empty value counts as unset.
        """
        environ = os.environ if environ is None else environ
        values = {}
        for option in fields(cls):
            for name in (option.name.upper(), *option.metadata["aliases"]):
                if text := environ.get(name, "").strip():
                    values[option.name] = _parse(option, name, text)
                    break
        if values.get("native_isa") == "none":
            values["native_kernels"] = False
        made = cls(**values)
        if made.quantization in ("int8", "int4") and not made.native_kernels:
            raise SettingError(
                f"QUANTIZATION={made.quantization} is not allowed: it needs NATIVE_KERNELS=true"
            )
        if made.kv_cache_dtype == "int8" and not made.native_kernels:
            raise SettingError("KV_CACHE_DTYPE=int8 is not allowed: it needs NATIVE_KERNELS=true")
        if made.api_keys_redis and made.redis_url is None:
            raise SettingError("API_KEYS_REDIS=true is not allowed: it needs REDIS_URL")
        if made.api_keys_redis and made.api_keys_file is not None:
            raise SettingError(
                "API_KEYS_REDIS=true is not allowed: API_KEYS_FILE says that the keys are in a file"
            )
        return made

    @property
    def listens_on_loopback(self) -> bool:
        """True where only this machine can reach the server."""
        return self.host in ("localhost", "::1", "[::1]") or self.host.startswith("127.")

    @property
    def downloads_allowed(self) -> bool:
        """ALLOW_DOWNLOAD with its default worked out."""
        return self._is_guarded if self.allow_download is None else self.allow_download

    @property
    def hub_cache(self) -> Path:
        """HF_HUB_CACHE with its default worked out."""
        return self.hf_hub_cache or self.hf_home / "hub"

    @property
    def metrics_allowed(self) -> bool:
        """METRICS_ENABLED with its default worked out."""
        return self._is_guarded if self.metrics_enabled is None else self.metrics_enabled

    @property
    def _is_guarded(self) -> bool:
        return self.listens_on_loopback or self.needs_key

    @property
    def needs_key(self) -> bool:
        """True where requests need an API key."""
        return self.api_keys_file is not None or self.api_keys_redis

    @property
    def inspected_per_min(self) -> int:
        """RATE_LIMIT_PER_MIN of /chat/stream and /inspect/*."""
        return 10 if self.rate_limit_per_min is None else self.rate_limit_per_min

    @cached_property
    def prompt_bytes(self) -> int:
        """MAX_PROMPT_BYTES of most routes."""
        return self.max_prompt_bytes or 1 << 20

    @property
    def inspected_prompt_bytes(self) -> int:
        """MAX_PROMPT_BYTES of /chat/stream and /inspect/*."""
        return self.max_prompt_bytes or 1 << 14

    @property
    def threads(self) -> int:
        """Threads of the HTTP server: one per request that runs or waits, and some for the rest."""
        return self.most_requests + 32

    @property
    def most_requests(self) -> int:
        """Requests that one process has threads for: a front's are those of several replicas."""
        replicas = FRONT_REPLICAS if self.engine == "ray" else 1
        return (self.max_inflight + self.max_queue) * replicas


def _parse(option: Field[Any], name: str, text: str) -> Any:
    try:
        return option.metadata["parse"](text)
    except ValueError as error:
        text = repr(text[:200]) if option.repr else "***"
        raise SettingError(f"{name}={text} is not allowed: expected {error}") from None

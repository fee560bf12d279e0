"""What the views work with; ``app.py`` makes it, ``services()`` finds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import cast

import flask

from transformers_api.api.disconnect import DisconnectWatcher
from transformers_api.serving.embeddings import EmbeddingModels
from transformers_api.serving.registry import ModelRegistry
from transformers_api.serving.store import ModelStore
from transformers_api.serving.swapper import Swapper
from transformers_api.settings import Settings

EXTENSION = "transformers_api"


def _always_ready() -> tuple[bool, str]:
    return True, "ready"


def _only_cpu() -> Collection[str]:
    return ("cpu",)


def _nothing_to_drain(_grace_s: float) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Services:
    """One per application, in ``app.extensions["transformers_api"]``."""

    settings: Settings
    registry: ModelRegistry
    store: ModelStore
    swapper: Swapper
    embeddings: EmbeddingModels | None = None  # None: ENABLE_EMBEDDINGS_BACKEND is off
    started_at: float = field(default_factory=time.monotonic)  # seconds, time.monotonic()
    created: int = field(default_factory=lambda: int(time.time()))  # the same, since 1970
    watcher: DisconnectWatcher = field(default_factory=DisconnectWatcher)
    ready: Callable[[], tuple[bool, str]] = _always_ready  # whether to send requests, and why not
    devices: Callable[[], Collection[str]] = (
        _only_cpu  # of this machine: "cpu", "cuda", "cuda:0", …
    )
    drain: Callable[[float], None] = _nothing_to_drain  # let answers finish for so many seconds


def services() -> Services:
    """The services of the application that handles this request."""
    return cast(Services, flask.current_app.extensions[EXTENSION])

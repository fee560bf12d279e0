"""The part of the environment that is no setting: what others hand over, or are to be told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def has_activated_sockets() -> bool:
    """True where systemd has handed this process its listening sockets."""
    is_ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return is_ours and os.environ.get("LISTEN_FDS", "0") != "0"


def cache_folder(*names: str) -> Callable[[], Path]:
    """A folder among the caches of this user, looked up when it is called."""
    return lambda: (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().joinpath(*names)
    )


def helper_environment() -> dict[str, str]:
    """The part of the environment that a helper process needs, without secrets."""
    names = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")
    return {name: os.environ[name] for name in names if name in os.environ}


def load_in_one_thread() -> None:
    """Tell transformers, which would read the weights of a model with a pool of threads."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


def take_notify_socket() -> str | None:
    """The address of systemd's notification socket, taken out of the environment."""
    return os.environ.pop("NOTIFY_SOCKET", None)


def secret(name: str) -> str:
    """The secret in this variable, such as an upstream's key; empty where there is none."""
    return os.environ.get(name, "")


def set_for_ray(**variables: str) -> None:
    """Hand Ray the settings that it only reads from the environment."""
    os.environ.update(variables)


def ray_environment() -> dict[str, str]:
    """The environment of the cluster's head: this one."""
    return dict(os.environ)


def set_for_transformers() -> None:
    """Tell transformers that a process without torch is meant to be one."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

"""One server for a model store and a device: a second would load the model once more."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from pathlib import Path

from transformers_api.config.settings import Settings

log = logging.getLogger(__name__)


class LockedByOther(RuntimeError):
    """Another process serves from this store; the message names it."""


def take(settings: Settings) -> int | None:
    """Lock until this process and its children end; the file's descriptor.

    None where RESIDENCY_LOCK is off, or where the store cannot be written. Raises LockedByOther.
    """
    if not settings.residency_lock:
        return None
    path = lock_file(settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        log.warning("No lock against a second server: %s: %s", path, error.strerror)
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(fd, 64).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise LockedByOther(
            f"Another server (pid {owner}) serves from MODEL_STORE={settings.model_store} on "
            f"DEFAULT_DEVICE={settings.default_device}; this one would load the model once more. "
            "Stop it, or set RESIDENCY_LOCK=false"
        ) from None
    os.truncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def lock_file(settings: Settings) -> Path:
    """The file of the lock: servers on other devices may share the store."""
    device = re.sub(r"\W", "-", settings.default_device)
    return settings.model_store / f".serving-{device}.lock"

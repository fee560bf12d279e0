"""Gunicorn's own lines, and those of every library, in the format of all others."""

from __future__ import annotations

import logging
import sys
from typing import Any

from gunicorn.glogging import Logger  # type: ignore[import-untyped]

from transformers_api import logs
from transformers_api.config.settings import Settings


class ServerLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """Gunicorn makes one when it starts, before it forks the worker."""

    settings: Settings

    def setup(self, cfg: Any) -> None:
        """Give every handler our format, and the root logger one for what libraries warn of."""
        super().setup(cfg)
        settings = self.settings
        lines = logs.formatter(settings.log_format, shows_texts=settings.log_prompts)
        root = logging.getLogger()
        if not root.handlers:
            root.addHandler(logging.StreamHandler(sys.stderr))
        for handler in (*self.error_log.handlers, *root.handlers):
            handler.setFormatter(lines)
        logging.captureWarnings(True)


def logger_class(settings: Settings) -> type[ServerLogger]:
    """Gunicorn's ``logger_class``."""
    return type("ServerLogger", (ServerLogger,), {"settings": settings})

"""Logging to standard error, one line per event, the request id in each."""

from __future__ import annotations

import contextvars
import logging
import re
import sys

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
SECRETS = re.compile(r"hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|Bearer \S+")


class LineFormatter(logging.Formatter):
    """One line per event: control characters escaped, secrets hidden; a trace follows indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        record.request_id = request_id.get()
        head, *trace = super().format(record).splitlines() or [""]
        text = "\n    ".join([head, *trace]) if record.exc_info else " ".join([head, *trace])
        return SECRETS.sub("***", text.replace("\x1b", "\\x1b"))


def configure_logging(level: str) -> None:
    """Send this package's log to standard error. Idempotent."""
    logger = logging.getLogger("transformers_api")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            LineFormatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")
        )
        logger.addHandler(handler)
        logger.propagate = False

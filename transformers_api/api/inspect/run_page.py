"""The page that shows a run: one file, which needs no server and no other host."""

from __future__ import annotations

from pathlib import Path

from transformers_api.api.inspect.attention_page import Page
from transformers_api.serving.inspect.run_file import Run

PAGE = Page(Path(__file__).parent / "pages" / "run.html")


def render(run: Run) -> str:
    """The page with all of a run but its activations."""
    return PAGE.render({**run.meta, "steps": list(run.steps)})

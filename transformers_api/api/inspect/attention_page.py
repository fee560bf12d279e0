"""The page that shows an attention matrix: one file, which needs no server and no other host."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers_api.api.http import strict_json

# What would end the script element that holds the data, or a line of it, is written as an escape.
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


class Page:
    """A page of its own, whose data stand in it; ``policy`` lets nothing but its own code run."""

    def __init__(self, template: Path) -> None:
        self._template = template.read_text(encoding="utf-8")
        # Nothing but the page's own script and style, so that no token's text can become either.
        self.policy = (
            f"default-src 'none'; script-src {self._hashes('script')}; "
            f"style-src {self._hashes('style')}; base-uri 'none'; form-action 'none'"
        )

    def render(self, data: Mapping[str, Any]) -> str:
        """The page with ``data`` in it."""
        head, _, tail = self._template.replace("%POLICY%", self.policy).partition("%DATA%")
        return head + strict_json.dump(data).decode().translate(_ESCAPES) + tail

    def _hashes(self, element: str) -> str:
        texts = re.findall(rf"<{element}>(.*?)</{element}>", self._template, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


_PAGE = Page(Path(__file__).parent / "pages" / "attention.html")
POLICY = _PAGE.policy


def render(data: Mapping[str, Any]) -> str:
    """The page with an answer of ``/inspect/full_attn`` in it, its ``attn`` as bytes."""
    return _PAGE.render(data)

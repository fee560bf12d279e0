"""What measurements write into the documents, between markers, and Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_block(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises ValueError where the page has no such place, or several.
    """
    pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
    found = pattern.findall(text)
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} places for <!-- {name} -->")
    block = f"<!-- {name} -->\n{content.strip()}\n<!-- /{name} -->"
    return pattern.sub(lambda _: block, text)


def write_block(page: Path, name: str, content: str) -> None:
    """Write it into a page, at once or not at all."""
    text = replace_block(page.read_text(), name, content)
    partial = page.with_name(f".{page.name}.partial")
    partial.write_text(text)
    partial.replace(page)

"""The text of a registry file, JSON or YAML, to plain values, whoever has written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from transformers_api.config.settings import SettingError

MAX_BYTES = 1 << 20
MAX_DIGITS = 40
MAX_NODES, MAX_NESTING = 20_000, 32  # of a YAML file; JSON's parser has limits of its own


def parse_registry(path: Path) -> Any:
    """The values of a file. Raises SettingError."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)  # not all of it: a device has no end
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"MODEL_REGISTRY_PATH={str(path)!r} is not allowed: expected a readable file ({error})"
        ) from None
    if len(text) > MAX_BYTES:
        raise SettingError(f"{path}: more than {MAX_BYTES >> 20} MiB are no registry")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix == ".json":
            raise SettingError(f"{path}: not valid JSON: {error}") from None
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML passes on whatever a scalar of a wrong kind raises
        reason = " ".join(str(error).split())
        raise SettingError(f"{path}: neither valid JSON nor YAML: {reason}") from None


class _Loader(yaml.SafeLoader):
    """YAML as far as a registry needs it: what an alias repeats counts each time."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = 0
        self._sizes: dict[str, int] = {}
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node. Raises yaml.YAMLError for more of them than any registry has."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before, anchor = self._nodes, getattr(event, "anchor", None)
        is_alias = isinstance(event, yaml.AliasEvent)
        self._nodes += self._sizes.get(anchor, MAX_NODES) if is_alias and anchor else 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_NESTING:
            raise yaml.YAMLError(
                f"more than {MAX_NODES} values, or nested more than {MAX_NESTING} deep"
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor and not is_alias:
            self._sizes[anchor] = self._nodes - before
        return node

    def construct_scalar(self, node: Any) -> Any:
        """The text of one scalar. Raises yaml.YAMLError for a number that is longer than any is.

        Numbers of many parts, such as ``1:59:59``, cost the square of their length.
        """
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of more than {MAX_DIGITS} digits")
        return super().construct_scalar(node)

"""The examination of a model on the disk, for the next process.

It runs several passes and gives the same every time: for the same model, kernels and sources, whose
digests the file's name is made of. A runner whose plans are stored states a digest of the logits
that it gave at this very load, so that what is found here was found of what is served.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers_api.engine.backend import Backend
from transformers_api.engine.platform.checked_file import (
    keep_newest,
    read_used,
    write_checked,
)
from transformers_api.engine.runners.model_runner import Runner, innermost
from transformers_api.inspection.attention import AttentionSource, install_tap
from transformers_api.inspection.base import Anatomy, AttentionMode, LayerAttention, Routing
from transformers_api.inspection.examination import Examined
from transformers_api.inspection.parts import Parts

log = logging.getLogger(__name__)
SUFFIX = ".examined"
MOST_FILES = 64


@dataclass(frozen=True)
class ExaminationStore:
    """The files of a folder. ``program``: the identity of all sources that examine."""

    folder: Path
    program: Callable[[], str]

    def file(
        self, model: Any, sizes: Mapping[str, int], backend: Backend, runner: Runner
    ) -> ExaminationFile | None:
        """The place of a model's examination; None where it is made anew at each load."""
        digest: str | None = getattr(innermost(runner), "logits_digest", None)
        if digest is None:
            return None
        facts = asdict(backend.describe(innermost(runner)))
        identity = self.program(), digest, model.config.to_dict(), dict(sizes), facts
        name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
        return ExaminationFile(self.folder / f"{name}{SUFFIX}", backend)


@dataclass(frozen=True)
class ExaminationFile:
    """The examination of one model that runs on ``backend``, there or not."""

    path: Path
    backend: Backend

    def read(self) -> Examined | None:
        """Return the examination, if it is whole; attention can be watched from then on."""
        content = read_used(self.path)
        if content is None:
            return None
        facts = json.loads(content)
        source = facts["source"]
        install_tap(source["implementation"])
        return Examined(
            anatomy=_anatomy(facts["anatomy"]),
            parts=_parts(facts["parts"]),
            source=AttentionSource(
                AttentionMode(source["mode"]),
                source["implementation"],
                tuple((layer, module, index) for layer, module, index in source["outputs"]),
                source["has_sinks"],
                self.backend if source["is_own"] else None,
            ),
        )

    def write(self, examined: Examined) -> None:
        """Store what was found, if it is possible; not of attention that the log says is wrong."""
        parts, source = examined.parts, examined.source
        if any(layer.reason == "not verified" for layer in examined.anatomy.attention):
            return
        made = parts.decoder_output
        own = {f.name: getattr(parts, f.name) for f in fields(parts) if f.name != "places"}
        facts = {
            "anatomy": asdict(examined.anatomy),
            "parts": {
                **own,
                "decoder_output": [made.__module__, made.__qualname__],
                "routing": parts.routing and asdict(parts.routing),
            },
            "source": {
                "mode": source.mode,
                "implementation": source.implementation,
                "outputs": source.outputs,
                "has_sinks": source.has_sinks,
                "is_own": source.backend is not None,
            },
        }
        try:
            write_checked(self.path, json.dumps(facts).encode())
            keep_newest(self.path.parent, f"*{SUFFIX}", MOST_FILES)
        except OSError as reason:
            log.info("What was found of this model is not stored: %r", reason)


def _anatomy(facts: dict[str, Any]) -> Anatomy:
    return Anatomy(
        **{
            **facts,
            "mode": AttentionMode(facts["mode"]),
            "attention": tuple(LayerAttention(**layer) for layer in facts["attention"]),
            "routing": _routing(facts["routing"]),
        }
    )


def _routing(facts: dict[str, Any] | None) -> Routing | None:
    return Routing(**{**facts, "layers": tuple(facts["layers"])}) if facts else None


def _parts(facts: dict[str, Any]) -> Parts:
    module, name = facts["decoder_output"]
    return Parts(
        **{
            **facts,
            "layers": tuple(facts["layers"]),
            "decoder_output": getattr(importlib.import_module(module), name),
            "routers": tuple((layer, router) for layer, router in facts["routers"]),
            "routing": _routing(facts["routing"]),
        }
    )

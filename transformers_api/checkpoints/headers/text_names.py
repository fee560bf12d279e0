"""Names of the language part's weights in a checkpoint that also sees or hears. Torch-free.

Such a checkpoint has the weights of a causal language model under a prefix of its own
(``language_model.model.``, ``model.language_model.``, ``model.text_model.``, …), beside those of
towers for images and sounds. The prefix is where the embedding of the tokens is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_SECTIONS = ("text_config", "thinker_config")
_TOWERS = ("vision_config", "audio_config")  # beside which text may have no section of its own
_EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight"
)
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|output)\.(weight|bias)")
_TOWER = re.compile(r"(.*\.)?\w*(visual|vision|image|audio|speech|talker|token2wav)\w*\..*")


def has_towers(config: Mapping[str, Any]) -> bool:
    """True for the configuration (config.json) of a model whose language part is served alone."""
    if any(isinstance(config.get(name), dict) for name in _SECTIONS):
        return True
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    sees = any(isinstance(config.get(name), dict) for name in _TOWERS)
    return sees and name.endswith("ForConditionalGeneration")


def text_prefix(names: Iterable[str]) -> str | None:
    """The prefix of a language model's own weights, with its dot; None where there is none."""
    prefixes = [
        match[1] or ""
        for name in names
        if not _TOWER.fullmatch(name) and (match := _EMBEDDING.fullmatch(name))
    ]
    return min(prefixes, key=len, default=None)


def text_weights(names: Iterable[str]) -> set[str]:
    """The names of the language part and of its head; all of them where no part is one."""
    listed = list(names)
    prefix = text_prefix(listed)
    if prefix is None:
        return set(listed)
    return {
        name
        for name in listed
        if not _TOWER.fullmatch(name) and (name.startswith(prefix) or _HEAD.fullmatch(name))
    }


def renamed(stored: Iterable[str], parameters: Iterable[str]) -> dict[str, str]:
    """Patterns for the stored names of a language part, with the model's own beginning of each.

    ``parameters``: the names in a causal language model without towers.
    """
    there, own = sorted(text_weights(stored)), list(parameters)
    prefix, ours = text_prefix(there), text_prefix(own)
    if prefix is None or ours is None:
        return {}
    patterns = {f"^{re.escape(prefix)}": ours}
    for name in own:
        if name.startswith(ours):
            continue
        outer = (each for each in there if not each.startswith(prefix))
        match = next((each for each in outer if f".{each}".endswith(f".{name}")), None)
        if match is not None and match != name:
            patterns[f"^{re.escape(match)}$"] = name
    return patterns

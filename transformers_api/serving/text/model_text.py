"""The words of a model: its entry, its tokenizer and its chat template, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.text.model_template import ModelTemplate
from transformers_api.serving.text.vocabulary import Vocabulary


class ModelText(Protocol):
    """The part of a model that turns text into ids and back. From any thread."""

    @property
    def spec(self) -> ModelSpec:
        """Its registry entry."""
        ...

    @property
    def tokenizer(self) -> Any:
        """A transformers PreTrainedTokenizer, used read-only."""
        ...

    @property
    def template(self) -> ModelTemplate:
        """The tokenizer's chat template."""
        ...

    @property
    def end_of_turn(self) -> frozenset[int]:
        """See ModelTemplate."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Its ids are below."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenizerOnly:
    """Meets ModelText; for a model that is not in memory."""

    spec: ModelSpec
    tokenizer: Any
    vocab_size: int
    max_model_len: int

    @cached_property
    def template(self) -> ModelTemplate:
        """See ModelText."""
        return ModelTemplate(self.tokenizer, self.vocab_size)

    @property
    def end_of_turn(self) -> frozenset[int]:
        """See ModelText."""
        return self.template.end_of_turn

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """See ModelText."""
        return Vocabulary(self.tokenizer)

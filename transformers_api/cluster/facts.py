"""The facts of a model in memory, as a replica tells them to fronts."""

from __future__ import annotations

from transformers_api.cluster.messages import ModelFacts
from transformers_api.serving.swap.loaded_model import LoadedModel


def stamp_of(model: LoadedModel) -> str:
    """Another text where the tokens of the model are others."""
    return repr((model.created, model.vocab_size, model.max_model_len, model.spec.name))


def facts_of(model: LoadedModel, age_s: float) -> ModelFacts:
    """The facts of a model in memory."""
    engine, embedder, scorer = model.engine, model.embedder, model.scorer
    maker = embedder or scorer
    return ModelFacts(
        stamp=stamp_of(model),
        engine=engine.describe(),
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        context_overflow=engine.context_overflow,
        tokenizer=model.tokenizer,
        fingerprint=model.fingerprint,
        created=model.created,
        load_s=model.load_s,
        file_types=dict(model.file_types),
        anatomy=None if model.inspector is None else model.inspector.anatomy,
        prompts=model.prompts,
        pools_prompts=model.pools_prompts,
        similarity=model.similarity,
        dimensions=None if embedder is None else embedder.dimensions,
        scores=scorer is not None,
        slice_tokens=1 if maker is None else maker.slice_tokens,
        age_s=age_s,
    )

"""Every numeric field of sampling at its bounds and next to them, on every way of sampling."""

import math

import pytest

from tests.engine.models import tiny_model
from tests.test_model_loader import loader_for
from tests.tokenizers import byte_level
from transformers_api.api.http.fields import Integer, Number
from transformers_api.api.openai.schemas.completions import CompletionRequest
from transformers_api.engine.base import DryParams, SamplingParams
from transformers_api.engine.thread import EngineThread
from transformers_api.serving.generation import GenerationRequest, collect, start
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec, PathSource

TINY = (5e-324, 1e-300, 1e-46, 1e-45, 1e-40, 1e-38, 2.0**-126, 1e-37, 1e-30, 1e-9)
BOUNDS = {
    "temperature": (0.0, 100.0),  # of /chat/stream; elsewhere 2
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 10.0),
    "word_repetition_penalty": (0.1, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "top_n_sigma": (-1.0, 1e6),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 100.0),
}
DRY = {"dry_multiplier": "multiplier", "dry_base": "base"}
EXCLUSIVE = ("typical_p", "repetition_penalty")  # "above 0"


@pytest.fixture(scope="module", params=["torch", "native"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edge")
    tiny_model("gpt2").save_pretrained(folder / "tiny")
    byte_level(chat_template=None).save_pretrained(folder / "tiny")
    native = {"native_kernels": False}
    if request.param == "native":
        cache = request.getfixturevalue("native_cache")
        native = {"native_kernels": True, "native_cache": cache}
    thread = EngineThread(1)
    loader = loader_for(thread, folder, **native)
    spec = ModelSpec(name="tiny", source=PathSource(folder / "tiny"), device="cpu")
    model = loader.load(spec, loader.prepare(spec, lambda share, text: None))
    yield model
    model.engine.close()
    thread.stop()


def ids_of(model, **params):
    dry = {DRY[name]: params.pop(name) for name in DRY if name in params}
    dry = DryParams(**{"multiplier": 1.0, "allowed_length": 0, **dry}) if dry else None
    fields = {"max_tokens": 3, "seed": 1, "ignore_eos": True, "dry": dry, **params}
    params = SamplingParams(**fields)
    (choice,) = collect(start(model, GenerationRequest([[1, 2, 1, 2]], params), Cancellation()))
    assert choice.finish_reason == "length"
    return choice.token_ids


@pytest.mark.parametrize(
    "others",
    [{}, {"presence_penalty": 1.0}, {"typical_p": 0.9}, {"top_k": 2}, {"xtc_probability": 0.5}],
)
@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_at_its_bounds_gives_tokens(model, name, others):
    low, high = BOUNDS[name]
    values = [high, math.nextafter(high, low), math.nextafter(low, high)]
    values += [] if name in EXCLUSIVE else [low]
    values += [value for value in TINY if low < value < high]
    for value in values:
        assert len(ids_of(model, **{**others, name: value})) == 3


@pytest.mark.parametrize(
    "others", [{}, {"presence_penalty": 1e-9}, {"typical_p": 0.9}, {"top_k": 2}]
)
def test_a_temperature_next_to_nothing_takes_the_likeliest_token(model, others):
    likeliest = ids_of(model, temperature=0)
    for value in TINY[:-1]:
        assert ids_of(model, temperature=value, **others) == likeliest


@pytest.mark.parametrize("name", ["top_p", "typical_p"])
def test_a_share_next_to_nothing_keeps_the_same_tokens_as_a_small_one(model, name):
    small = ids_of(model, **{name: 1e-9})
    for value in TINY:
        assert ids_of(model, **{name: value}) == small


@pytest.mark.parametrize("value", [5e-324, 1e-38, 1e-30])
def test_a_penalty_next_to_nothing_repeats_what_was_said(model, value):
    repeated = ids_of(model, temperature=0, repetition_penalty=value)
    assert repeated == ids_of(model, temperature=0, repetition_penalty=1e-30)


def test_the_bounds_are_those_of_the_fields():
    for name, field in CompletionRequest().fields.items():
        if isinstance(field, Number) and not isinstance(field, Integer):
            (bounds,) = field.validators
            low, high = BOUNDS[name]
            assert (bounds.min, bounds.max) == (low, min(high, bounds.max))
            assert (not bounds.min_inclusive) is (name in EXCLUSIVE)

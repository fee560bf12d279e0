"""Adapters over bases whose weights lie in a quantised format: found, and applied beside them."""

from __future__ import annotations

import pytest

from tests import lora
from tests.engine.models import prompts_of
from tests.engine.native.test_stored_weights import load  # noqa: F401
from tests.engine.test_adapters import scores
from tests.quantized_models import FORMATS, write_quantized
from tests.repeats import slow
from transformers_api.serving.models.adapter_files import check_base, inspect_adapter
from transformers_api.serving.models.sidecars import tensor_shapes

PROMPT = prompts_of(6)[5]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_adapter_fits_a_base_of_every_format(tmp_path, name):
    model, _ = write_quantized(FORMATS[name], tmp_path / "base")
    folder = lora.adapter(tmp_path / "adapter", model, lora.ALL)
    check_base(*inspect_adapter(folder, "mine"), tensor_shapes(tmp_path / "base"))


@pytest.mark.parametrize("name", [sorted(FORMATS)[0], *slow(*sorted(FORMATS)[1:])])
def test_an_adapter_does_to_a_quantised_base_what_it_does_to_its_numbers(
    load,  # noqa: F811
    tmp_path,
    native_cache,
    name,
):
    model, _ = write_quantized(FORMATS[name], tmp_path / "base")
    source = lora.source(lora.adapter(tmp_path / "adapter", model, lora.ALL))
    engine = load(tmp_path / "base", native=native_cache, quantization="stored")
    model.save_pretrained(tmp_path / "numbers")
    plain = load(tmp_path / "numbers", native=native_cache, dtype="float32")
    before = [scores(each, PROMPT) for each in (engine, plain)]
    after = [scores(each.adapted(source), PROMPT) for each in (engine, plain)]
    stored, numbers = (b - a for a, b in zip(before, after, strict=True))
    assert numbers.norm() > 0.02
    assert (stored - numbers).norm() < 0.2 * numbers.norm()

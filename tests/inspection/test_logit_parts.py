"""Shares of a logit: that they add up, and that each is what its definition says."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.models import BATCHED, SEQUENTIAL, TOGETHER, prompts_of
from tests.inspection.models import tiny
from tests.repeats import slow
from transformers_api.errors import ModelNotCapable
from transformers_api.inspection.logit_share import LogitPartsQuestion

PROMPT = prompts_of(4)[3]  # 17 tokens: three slices of 8
LAST = len(PROMPT) - 1
KINDS = [*BATCHED, *TOGETHER, *SEQUENTIAL, "granite", "cohere2", "deepseek-mla", "qwen3-moe"]
WAYS = ("layer", "head", "neuron", "source")
REFUSED = {
    "mixtral": ("neuron",),
    "qwen3-moe": ("neuron",),
    "gpt-oss-sinks": ("neuron",),
    "bloom-alibi": ("source",),
    "gpt-neo-local": ("source",),
    "mamba": ("head", "neuron", "source"),
    "rwkv": WAYS,  # its first layer norms the embedding: the stream begins anew
    "gpt-1-without-cache": WAYS,  # its layers end in a norm
}


def ask(watched, **question):
    question = {"position": LAST} | question
    return watched.run(watched.inspector.logit_parts(PROMPT, LogitPartsQuestion(**question)))


def value_of(result, part, layer, index=-1, position=-1):
    (value,) = [
        share.value
        for share in result.shares
        if (share.part, share.layer, share.index, share.position) == (part, layer, index, position)
    ]
    return value


def run_plain(name):
    """The model by itself: its outputs, and the inputs and outputs of its modules."""
    model = copy.deepcopy(tiny(name))
    inputs, outputs = {}, {}

    def note(module_name):
        def hook(_module, args, output):
            inputs[module_name] = args[0] if args else None
            outputs[module_name] = output[0] if isinstance(output, tuple) else output

        return hook

    for module_name, module in model.named_modules():
        module.register_forward_hook(note(module_name))
    model.set_attn_implementation("eager")
    model = model.requires_grad_(False)
    with torch.no_grad():
        output = model(torch.tensor([PROMPT]), output_attentions=True)
    return model, output, inputs, outputs


@pytest.mark.parametrize("name", [*KINDS[:3], *slow(*KINDS[3:])])
def test_shares_add_up_to_the_models_own_logit_or_the_question_is_refused(watch, name):
    with torch.no_grad():
        logits = tiny(name)(torch.tensor([PROMPT])).logits[0, -1].float()
    expected = {None: logits[5], 7: logits[5] - logits[7], "mean": logits[5] - logits.mean()}
    refused = REFUSED.get(name, ())
    for by, against in zip(WAYS, (None, 7, "mean", None), strict=True):
        if by in refused:
            with pytest.raises(ModelNotCapable) as error:
                ask(watch(name), by=by)
            assert error.value.param in ("by", "model")
            continue
        result = ask(watch(name), token_id=5, against=against, by=by)
        assert result.model_logit == pytest.approx(float(expected[against]), abs=1e-4)
        assert result.is_capped or result.logit == pytest.approx(result.model_logit, abs=1e-5)
        total = sum(share.value for share in result.shares) + result.constant
        assert total == pytest.approx(result.logit, abs=1e-5)
        assert total + result.rounding == pytest.approx(result.logit, abs=1e-9)


def test_every_share_of_llama_is_what_the_papers_say(watch):
    model, output, inputs, outputs = run_plain("llama")
    heads = model.config.num_attention_heads
    streams = outputs["model.layers.2"][0, -1]
    scale = model.model.norm.weight / (streams.square().mean() + 1e-6).sqrt()
    unembedding = model.lm_head.weight[5] * scale
    by_layer, by_head, by_neuron, by_source = (
        ask(watch("llama"), token_id=5, by=by) for by in WAYS
    )
    embed = outputs["model.embed_tokens"][0, -1]
    assert value_of(by_layer, "embed", -1) == pytest.approx(float(embed @ unembedding), abs=1e-5)
    for layer in range(model.config.num_hidden_layers):
        own = f"model.layers.{layer}"
        for part, module in (("attn", "self_attn"), ("mlp", "mlp")):
            right = float(outputs[f"{own}.{module}"][0, -1] @ unembedding)
            assert value_of(by_layer, part, layer) == pytest.approx(right, abs=1e-5)
        before = inputs[f"{own}.self_attn.o_proj"][0, -1].reshape(heads, -1)
        matrix = model.model.layers[layer].self_attn.o_proj.weight
        size = before.shape[1]
        values = outputs[f"{own}.self_attn.v_proj"][0].reshape(len(PROMPT), -1, size)
        for head in range(heads):
            reads = matrix[:, head * size : (head + 1) * size]
            right = float(reads @ before[head] @ unembedding)
            assert value_of(by_head, "head", layer, head) == pytest.approx(right, abs=1e-5)
            group = heads // values.shape[1]
            for position, weight in enumerate(output.attentions[layer][0, head, -1]):
                right = float(weight * (reads @ values[position, head // group]) @ unembedding)
                value = value_of(by_source, "source", layer, head, position)
                assert value == pytest.approx(right, abs=1e-5)
        down = model.model.layers[layer].mlp.down_proj.weight
        neurons = inputs[f"{own}.mlp.down_proj"][0, -1]
        for neuron in (0, 7, len(neurons) - 1):
            right = float(neurons[neuron] * (down[:, neuron] @ unembedding))
            assert value_of(by_neuron, "neuron", layer, neuron) == pytest.approx(right, abs=1e-5)


def test_the_first_token_and_the_models_own_choice_are_asked_for(watch):
    watched = watch("llama")
    with torch.no_grad():
        logits = tiny("llama")(torch.tensor([PROMPT])).logits[0]
    for position in (0, 7, 8, LAST):
        result = ask(watched, position=position)
        assert result.token_id == int(logits[position].argmax())
        assert result.logit == pytest.approx(float(logits[position].max()), abs=1e-4)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, *slow({"quantization": "int8"})])
def test_what_the_stream_rounds_is_a_part_of_its_own(watch, options):
    for by in WAYS:
        result = ask(watch("llama", **options), token_id=5, by=by)
        size = sum(abs(share.value) for share in result.shares)
        assert abs(result.rounding) < 0.02 * size
        total = sum(share.value for share in result.shares) + result.constant + result.rounding
        assert total == pytest.approx(result.logit, abs=1e-9)

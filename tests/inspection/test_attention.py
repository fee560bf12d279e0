"""The tap itself: what it finds right, what it catches, and that it is not in the way."""

from __future__ import annotations

from itertools import chain

import numpy
import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.engine.models import prompts_of
from tests.inspection.models import sharp, tiny
from tests.inspection.test_trace import SHOWN, generate
from transformers_api.engine.native import backend
from transformers_api.inspection.activations import ActivationSpec
from transformers_api.inspection.attention import Attended, Tap, install_tap
from transformers_api.inspection.base import AttentionMode, TracePlan
from transformers_api.inspection.examination import examine
from transformers_api.kernels.graph import hooks
from transformers_api.kernels.modules.attention import replay_attention

TAPPED = {"gemma2", "gpt-oss-sinks", "gpt-neo-local", "bloom-alibi", "gpt-1-without-cache", "gptj"}
HOOKED = TAPPED | {"mpt-alibi"}


def examined(model):
    with torch.inference_mode():
        return examine(model, vocab_size=97, context=128)


@pytest.mark.parametrize("name", SHOWN)
def test_every_row_that_is_shown_made_the_output(name):
    anatomy = examined(tiny(name)).anatomy
    assert anatomy.verified
    if name in HOOKED:
        assert anatomy.mode is AttentionMode.HOOK
    else:
        assert anatomy.mode is AttentionMode.TAP
        assert anatomy.max_rel_err < 2e-6


@pytest.fixture
def sabotage():
    """sabotage(how): the function named sdpa does something else than it is given."""
    install_tap("sdpa")
    tap = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def make(change):
        def changed(module, query, key, value, attention_mask, *args, **options):
            return tap.function(
                *change(module, query, key, value, attention_mask), *args, **options
            )

        AttentionInterface.register("sdpa", Tap(changed, "sdpa"))

    yield make
    AttentionInterface.register("sdpa", tap)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m, q, k, v, mask: (m, q * 3, k, v, mask), id="another scale"),
        pytest.param(
            lambda m, q, k, v, mask: (m, q, k, v, torch.ones(12, 12).bool()), id="no mask"
        ),
        pytest.param(lambda m, q, k, v, mask: (m, q.flip(1), k, v, mask), id="other heads"),
    ],
)
def test_rows_that_did_not_make_the_output_are_not_shown(sabotage, change):
    sabotage(change)
    anatomy = examined(tiny("llama")).anatomy
    assert anatomy.layers_with_attention == []
    assert not anatomy.verified
    assert {layer.reason for layer in anatomy.attention} == {"not verified"}
    assert anatomy.attention[0].max_rel_err > 0.01


def test_the_tap_is_installed_once_and_under_the_same_name():
    assert install_tap("sdpa")
    first = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert install_tap("sdpa")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first
    assert not install_tap("eager")


def test_nobody_is_told_on_another_thread_or_after_the_block():
    model, told = tiny("llama"), []
    source = examined(model).source
    ids = torch.tensor([prompts_of(2)[1]])
    with torch.inference_mode():
        with source.watched(model, lambda layer, _weights: told.append(layer)):
            model(input_ids=ids)
        assert told == [0, 1, 2]
        model(input_ids=ids)
        assert told == [0, 1, 2]


@pytest.mark.parametrize("name", ["gemma2", "bloom-alibi"])
def test_hooks_are_gone_after_the_block_also_when_it_fails(name):
    model = tiny(name)
    source = examined(model).source
    with pytest.raises(ZeroDivisionError), source.watched(model, lambda *_: None):
        1 / 0  # noqa: B018
    assert not any(module._forward_hooks for module in model.modules())


def attended(dtype, **options):
    """Random q, k, v of one sequence: four heads, two of keys and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    module.is_causal = True
    tap = Tap(ALL_ATTENTION_FUNCTIONS["sdpa"], "sdpa")
    output, _ = tap(module, q, k, v, None, **options)
    return Attended(module, q, k, v, None, output, options, aligns_ends=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_exact_softmax_of_what_the_kernel_read(dtype):
    """In bfloat16 eager attention itself is 1e-2 from this: it rounds the scores."""
    seen = attended(dtype, scaling=0.3)
    rows, sink = seen.rows(0, slice(None))
    q, k = seen.query[0].double(), seen.key[0].double().repeat_interleave(2, 0)
    scores = q @ k.transpose(-1, -2) * 0.3
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    assert sink is None
    torch.testing.assert_close(rows.double(), scores.softmax(-1), atol=1e-5, rtol=0)
    assert seen.error() <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_eager_s_rounding_explains_its_distance_in_bfloat16():
    """The same q and k, with the scores rounded as eager attention does, give eager's weights.

    But where another order of sums puts a score on the other side of two bfloat16 numbers.
    """
    seen = attended(torch.bfloat16, scaling=0.3)
    q, k = seen.query[0], seen.key[0].repeat_interleave(2, 0)
    mask = torch.zeros(9, 9, dtype=torch.bfloat16)
    mask = mask.masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.bfloat16).min)
    eager = (q @ k.transpose(-1, -2) * 0.3 + mask).softmax(-1, dtype=torch.float32)
    rounded = (seen._products(0, slice(None), None).bfloat16() * 0.3 + mask).float().softmax(-1)
    exact, _ = seen.rows(0, slice(None))
    assert (eager - exact).abs().max() > 1e-4
    assert (eager - rounded).abs().mean() < 0.05 * (eager - exact).abs().mean()


def test_a_soft_cap_a_bias_and_sinks_are_in_the_rows():
    seen = attended(torch.float32)
    bias = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    with_all = Attended(
        seen.module,
        seen.query,
        seen.key,
        seen.value,
        None,
        seen.output,
        {"softcap": 2.0, "position_bias": bias, "s_aux": sinks, "scaling": 0.5},
        aligns_ends=False,
    )
    scores = seen.query[0] @ seen.key[0].repeat_interleave(2, 0).transpose(-1, -2) * 0.5
    scores = (scores / 2).tanh() * 2 + bias[0]
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    extra = torch.cat([scores, sinks[:, None, None].expand(4, 9, 1)], -1).softmax(-1)
    for heads in (None, [2, 0]):
        rows, sink = with_all.rows(0, slice(3, 9), heads)
        chosen = slice(None) if heads is None else heads
        torch.testing.assert_close(rows, extra[chosen, 3:, :-1])
        torch.testing.assert_close(sink, extra[chosen, 3:, -1])
    assert with_all.has_sinks


def test_with_native_kernels_what_they_compute_is_verified(watch, native_cache, monkeypatch):
    anatomy = watch("llama", native=native_cache, dtype="bfloat16").examined.anatomy
    assert (anatomy.dtype, anatomy.mode) == ("bfloat16", AttentionMode.TAP)
    assert anatomy.verified
    assert anatomy.max_rel_err < 2e-3  # the kernel rounds shares as it does keys

    def shown_wrongly(module, tensors, *args):
        *given, output = tensors
        replay_attention(module, (*given, output * 1.1), *args)

    monkeypatch.setattr(hooks, "replay_attention", shown_wrongly)
    anatomy = watch(tiny("llama"), native=native_cache, dtype="bfloat16").examined.anatomy
    assert not anatomy.verified
    assert anatomy.layers_with_attention == []


def test_sharp_heads_are_shown_by_the_queries_that_were_multiplied(watch, native_cache):
    """Scores of dozens: what is rounded away of a query decides which key is read."""
    anatomy = watch(sharp("llama"), native=native_cache, dtype="bfloat16").examined.anatomy
    assert anatomy.layers_with_attention == [0, 1, 2]
    assert anatomy.max_rel_err < 2e-3


def test_a_pass_shows_only_the_layers_that_are_asked_for(watch, native_cache, monkeypatch):
    watched = watch("llama", native=native_cache)
    shown = []

    def showing(module, *args):
        shown.append(module.layer_idx)
        replay_attention(module, *args)

    monkeypatch.setattr(hooks, "replay_attention", showing)
    plan = TracePlan(layers=(1,), activations=(ActivationSpec(part="q", layer=1),))
    (outputs,) = generate(watched.engine, prompts_of(1), plan, max_tokens=3)
    assert shown == [1] * len(outputs)
    generate(watched.engine, prompts_of(1), TracePlan(layers=(1,), topk=2), max_tokens=3)
    assert len(shown) == len(outputs)  # the kernels note the rows themselves


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"kv_cache_dtype": "int8"}),
        ("gemma2", {"dtype": "bfloat16"}),
        ("mistral-window-8", {}),
        ("gpt-oss-sinks", {}),
    ],
)
def test_rows_that_the_kernels_note_are_those_that_they_would_show(
    watch, native_cache, monkeypatch, name, options
):
    watched = watch(name, native=native_cache, **options)
    plan = TracePlan(layers=tuple(watched.examined.anatomy.layers_with_attention))
    prompts = [prompt * 2 for prompt in prompts_of(3)]
    noted = generate(watched.engine, prompts, plan)
    monkeypatch.setattr(backend, "noting_attention", lambda places: hooks.noting_attention({}))
    shown = generate(watched.engine, prompts, plan)
    count = 0
    for one, other in zip(chain(*noted), chain(*shown), strict=True):
        rows = one.extras["trace"].attention, other.extras["trace"].attention
        for own, same in zip(*rows, strict=True):
            assert (own.layer, own.key_start, own.width) == (same.layer, same.key_start, same.width)
            numpy.testing.assert_array_equal(own.weights, same.weights)
            assert (own.sink is None) == (same.sink is None) == ("sinks" not in name)
            if own.sink is not None:
                numpy.testing.assert_array_equal(own.sink, same.sink)
            count += 1
    assert count == 30 * len(plan.layers)

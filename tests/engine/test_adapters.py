"""Adapters (LoRA) beside a model's weights: the tokens of the merged model, in any company."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from tests import lora
from tests.engine.models import tiny_model
from tests.engine.reading import GREEDY, ask, complete, read, tokens
from tests.repeats import slow
from transformers_api.engine.adapters import SLICE_BYTES
from transformers_api.engine.runners.adapted_modules import read_by_every_token
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.errors import InsufficientMemory, ModelLoadFailed, ModelUnloaded, Unavailable

PROMPT = [5, 9, 33, 71, 8, 2, 90, 17, 44, 3, 61]
KERNELS = ["native", "torch"]


@pytest.fixture(params=KERNELS)
def kernels(request, native_default):
    """The cache of the kernels, or None: torch."""
    if request.param == "native" and native_default is None:
        pytest.skip("no native kernels")
    return native_default if request.param == "native" else None


def scores(engine, prompt=PROMPT, **params):
    """Log probabilities of the prompt's tokens and the likeliest at the end."""
    request = ask(prompt, max_tokens=1, prompt_logprobs=0, logprobs=5, **GREEDY, **params)
    (output,) = read(engine.submit([request]))[0]
    assert output.error is None, output.error
    return torch.tensor(
        [s.logprob for s in output.prompt_scores[1:]] + [lp for _, lp in output.score.top]
    )


def greedy(engine, *prompts, count=12):
    return complete(engine, *(ask(p, max_tokens=count, **GREEDY) for p in prompts or (PROMPT,)))


OPTIONS = {
    "plain": ("llama", ["q_proj", "v_proj"], {}),
    "alpha": ("llama", ["q_proj"], {"lora_alpha": 3.5}),
    "rslora": ("llama", ["o_proj", "down_proj"], {"use_rslora": True}),
    "dora": ("llama", ["q_proj", "k_proj", "up_proj", "down_proj"], {"use_dora": True}),
    "dora-rslora": ("gemma2", ["v_proj", "o_proj"], {"use_dora": True, "use_rslora": True}),
    "dora-conv1d": ("gpt2", ["c_attn", "c_fc"], {"use_dora": True, "fan_in_fan_out": True}),
    "dora-biased": ("gpt-neox", ["query_key_value", "dense"], {"use_dora": True}),
    "every-layer": (
        "llama",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        {},
    ),
    "pattern": (
        "llama",
        ["layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"],
        {"target_modules": r".*\.(1|2)\.self_attn\.q_proj"},
    ),
    "all-linear": ("llama", ["k_proj", "up_proj"], {"target_modules": "all-linear"}),
    "one-layer": ("llama", ["layers.1.mlp.up_proj"], {"layers_to_transform": [1]}),
    "head": ("llama", ["lm_head", "q_proj"], {}),
    "conv1d": ("gpt2", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "gemma": ("gemma2", ["q_proj", "gate_proj", "down_proj"], {}),
    "windows": ("gemma3", ["k_proj", "o_proj"], {}),
    "tied-head": ("gemma3", ["lm_head"], {}),
    "gpt-neox": ("gpt-neox", ["query_key_value", "dense"], {}),
    "mixture": ("mixtral", ["q_proj", "o_proj"], {}),
    "bfloat16": ("llama", ["v_proj"], {"dtype": torch.bfloat16}),
    "float16": ("llama", ["v_proj"], {"dtype": torch.float16}),
    "float64": ("llama", ["v_proj"], {"dtype": torch.float64}),
    "recurrent": ("mamba", ["in_proj", "out_proj"], {}),
    "partly-recurrent": ("conv-hybrid", ["q_proj", "in_proj", "w1"], {}),
    "one-at-a-time": ("bloom-alibi", ["query_key_value", "dense_h_to_4h"], {}),
}


REPEATS = (
    "dora-rslora",
    "dora-conv1d",
    "alpha",
    "all-linear",
    "one-layer",
    "windows",
    "gpt-neox",
    "float16",
    "float64",
)


@pytest.mark.parametrize("name", [*slow(*REPEATS), *(n for n in OPTIONS if n not in REPEATS)])
def test_an_adapter_gives_what_the_merged_model_gives(make_engine, tmp_path, kernels, name):
    model_name, layers, config = OPTIONS[name]
    model = tiny_model(model_name)
    folder = lora.adapter(tmp_path / name, model, layers, **config)
    engine = make_engine(model_name, native=kernels)
    with_adapter = engine.adapted(lora.source(folder))
    expected = make_engine(lora.merged(model, folder), native=kernels)
    effect = (scores(engine) - scores(expected)).abs().max()
    assert effect > 0.02
    assert (scores(with_adapter) - scores(expected)).abs().max() < 0.01 * effect
    assert greedy(with_adapter) == greedy(expected)
    with_adapter.close()


def test_each_layer_may_have_a_rank_and_an_alpha_of_its_own(make_engine, tmp_path, kernels):
    model = tiny_model("llama")
    paths = lora.matching(model, ["q_proj", "v_proj"])
    ranks = {p: 7 if p.startswith("model.layers.1.") else 2 if "v_proj" in p else 4 for p in paths}
    folder = lora.save(
        tmp_path / "patterns",
        lora.matrices(model, paths, 4, 0, ranks),
        rank_pattern={r"layers\.1\..*": 7, "v_proj": 2},
        alpha_pattern={"layers.2.self_attn.q_proj": 1, "v_proj": 16},
    )
    engine = make_engine("llama", native=kernels).adapted(lora.source(folder))
    expected = make_engine(lora.merged(model, folder), native=kernels)
    assert torch.allclose(scores(engine), scores(expected), atol=2e-3)


@pytest.mark.parametrize(
    ("model_name", "before", "after"),
    [
        ("gpt2", "transformer.h", "h"),  # of a model without its head
        ("llama", "model.layers", "layers"),
        ("llama", "model.layers", "model.language_model.layers"),  # of one that sees, too
        ("llama", "model.layers", "language_model.model.layers"),
    ],
)
def test_layers_are_found_under_the_names_of_other_classes(
    make_engine, tmp_path, model_name, before, after
):
    model = tiny_model(model_name)
    paths = lora.matching(model, ["c_attn", "v_proj"])
    parts = lora.matrices(model, paths, 4, 0)
    renamed = {path.replace(before, after): pair for path, pair in parts.items()}
    engine = make_engine(model_name)
    sources = [lora.source(lora.save(tmp_path / n, p)) for n, p in (("a", parts), ("b", renamed))]
    answers = [greedy(engine.adapted(source)) for source in sources]
    assert answers[0] == answers[1] != greedy(engine)


@pytest.fixture
def adapters(tmp_path):
    """Three adapters of the tiny Llama: other layers, ranks and numbers."""
    model = tiny_model("llama")
    return [
        lora.source(lora.adapter(tmp_path / "a", model, ["q_proj", "v_proj"], seed=1)),
        lora.source(lora.adapter(tmp_path / "b", model, ["q_proj", "down_proj"], seed=2, rank=9)),
        lora.source(lora.adapter(tmp_path / "c", model, ["gate_proj", "lm_head"], seed=3, rank=1)),
    ]


def bits(outputs):
    return [(o.token_id, o.score, o.finish_reason) for o in outputs]


def test_adapters_and_base_in_one_batch_get_what_each_gets_alone(make_engine, adapters, kernels):
    """Bit for bit on the kernels, token for token in torch."""
    engine = make_engine("llama", native=kernels, num_slots=8, prefill_chunk=16)
    engines = [engine, *(engine.adapted(each) for each in adapters)]
    requests = [
        ask([*PROMPT[:n], 7 + n], max_tokens=14, logprobs=1, ignore_eos=True, temperature=t, seed=n)
        for n, t in ((11, 0.0), (3, 0.8), (8, 0.0))
    ]
    alone = [bits(read(own.submit([r]))[0]) for r in requests for own in engines]
    assert len({tuple(token for token, *_ in each) for each in alone[:4]}) == 4
    streams = [own.submit([r]) for r in requests for own in engines]
    together = [bits(read(stream)[0]) for stream in streams]
    if kernels is None:
        alone, together = ([[t for t, *_ in each] for each in some] for some in (alone, together))
    assert together == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_bits_of_the_base_are_those_without_adapters(
    make_engine, native_cache, adapters, dtype, quantization
):
    options = {"native": native_cache, "dtype": dtype, "quantization": quantization}
    engine = make_engine("llama", num_slots=6, **options)
    request = ask(PROMPT, max_tokens=20, logprobs=3, **GREEDY)
    before = bits(read(engine.submit([request]))[0])
    plan = innermost(engine.runner).passes["layers"].plan
    steps = plan.steps.base.copy()
    others = [engine.adapted(each).submit([request]) for each in adapters]
    assert bits(read(engine.submit([request]))[0]) == before
    assert len({tuple(bits(read(each)[0])) for each in others}) == 3
    assert bits(read(engine.submit([request]))[0]) == before
    assert innermost(engine.runner).passes["layers"].plan is plan
    assert (plan.steps.base == steps).all()


@pytest.mark.parametrize("first", ["base", "adapter"])
def test_what_one_has_read_is_of_no_use_to_another(make_engine, adapters, kernels, first):
    engine = make_engine("llama", native=kernels)
    adapted, other = (engine.adapted(each) for each in adapters[:2])
    greedy(engine, [30], [31], [32], [34])  # there are rows for four
    alone = [
        greedy(make_engine("llama", native=kernels)),
        greedy(make_engine("llama", native=kernels).adapted(adapters[0])),
    ]
    pair = [engine, adapted]
    order = (0, 1, 0, 1) if first == "base" else (1, 0, 1, 0)
    for turn, which in enumerate(order):
        stream = pair[which].submit([ask(PROMPT, max_tokens=12, **GREEDY)])
        outputs = read(stream)[0]
        assert [o.token_id for o in outputs] == alone[which][0]
        assert bool(outputs[0].cached_tokens) == (turn > 1)
    assert greedy(other) != alone[1]


def test_a_prompt_that_is_being_read_is_not_waited_for_by_another_adapter(make_engine, adapters):
    engine = make_engine("llama", num_slots=4, prefill_chunk=4)
    adapted = engine.adapted(adapters[0])
    expected = [greedy(engine, PROMPT * 4), greedy(adapted, PROMPT * 4)]
    fresh = make_engine("llama", num_slots=4, prefill_chunk=4)
    pair = [fresh, fresh.adapted(adapters[0])]
    streams = [own.submit([ask(PROMPT * 4, max_tokens=12, **GREEDY)]) for own in pair]
    assert [tokens(stream) for stream in streams] == expected


def test_tokens_that_are_read_ahead_go_through_the_adapter(make_engine, native_cache, adapters):
    prompt = [5, 9, 33] * 8
    request = ask(prompt, max_tokens=40, logprobs=1, **GREEDY)
    plain, ahead = (
        make_engine("llama", native=native_cache, prompt_lookup_tokens=most) for most in (0, 8)
    )
    for source in adapters:
        own = [bits(read(each.adapted(source).submit([request]))[0]) for each in (plain, ahead)]
        assert own[0] == own[1]


def test_an_adapter_is_read_once_and_kept_while_there_is_room(make_engine, adapters, kernels):
    size = max(each.bytes for each in adapters)
    engine = make_engine("llama", native=kernels, adapter_bytes=size + 1000)
    first = engine.adapted(adapters[0])
    assert [(each.name, each.users) for each in engine.stats().adapters] == [("a", 1)]
    again = engine.adapted(adapters[0])
    assert engine.stats().adapters[0].users == 2
    with pytest.raises(Unavailable, match="MAX_ADAPTERS_MB"):
        engine.adapted(adapters[1], timeout=0.01)
    assert greedy(first) == greedy(again)
    for each in (first, again, again):  # a second time is nothing
        each.close()
    other = engine.adapted(adapters[1])
    assert [each.name for each in engine.stats().adapters] == ["b"]
    answer = greedy(other)
    other.close()
    assert greedy(engine.adapted(adapters[0])) == greedy(first) != answer


def test_a_request_waits_for_room_until_an_adapter_is_given_back(make_engine, adapters):
    engine = make_engine("llama", adapter_bytes=max(each.bytes for each in adapters))
    held = engine.adapted(adapters[0])
    asked = []

    def is_cancelled():
        asked.append(True)
        held.close()
        return False

    assert greedy(engine.adapted(adapters[1], timeout=30, is_cancelled=is_cancelled))
    assert asked
    with pytest.raises(Unavailable):
        engine.adapted(adapters[2], is_cancelled=lambda: True)


def test_a_large_adapter_is_read_in_several_visits(make_engine, tmp_path, kernels):
    engine = make_engine("llama", native=kernels)
    source = lora.source(lora.adapter(tmp_path / "a", tiny_model("llama"), lora.ALL, rank=1024))
    assert source.bytes > SLICE_BYTES
    visits, call = [], engine.call
    engine.call = lambda visit: visits.append(visit) or call(visit)
    adapted = engine.adapted(source)
    engine.call = call
    assert len(visits) > 1
    assert greedy(adapted) != greedy(engine)


def test_an_adapter_larger_than_all_room_is_refused(make_engine, adapters):
    engine = make_engine("llama", adapter_bytes=100)
    with pytest.raises(InsufficientMemory, match="MAX_ADAPTERS_MB"):
        engine.adapted(adapters[0])


def test_an_adapter_can_be_taken_out_of_memory_while_nobody_uses_it(make_engine, adapters):
    engine = make_engine("llama")
    own = engine.adapted(adapters[0])
    assert not engine.evict_adapter("a")
    own.close()
    assert engine.evict_adapter("a")
    assert not engine.evict_adapter("a")
    assert engine.stats().adapters == ()


def test_a_changed_file_is_another_adapter(make_engine, tmp_path, kernels):
    model = tiny_model("llama")
    engine = make_engine("llama", native=kernels)
    answers = []
    for seed in (1, 2):
        source = lora.source(lora.adapter(tmp_path / "a", model, seed=seed))
        own = engine.adapted(source)
        answers.append(greedy(own))
        own.close()
    assert answers[0] != answers[1]
    assert [each.name for each in engine.stats().adapters] == ["a"]


def broken(folder, **changes):
    """The adapter's numbers, some of them replaced."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, change in changes.items():
        key = next(key for key in tensors if name in key)
        tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("model_name", "layers", "changes", "message"),
    [
        ("llama", ["q_proj"], {"lora_A": lambda t: t * float("nan")}, "lora_A.weight has numbers"),
        ("llama", ["q_proj"], {"lora_B": lambda t: t / 0}, "lora_B.weight has numbers"),
        ("llama", ["q_proj"], {"lora_A": lambda t: t[:, :-1]}, "32 and 32"),
        ("llama", ["q_proj"], {"lora_B": lambda t: t[:-1]}, "32 and 32"),
        ("gpt2", ["c_attn"], {}, "no layer transformer.h.0.attn.c_attn"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_and_nothing_is_left(
    make_engine, tmp_path, kernels, model_name, layers, changes, message
):
    folder = lora.adapter(tmp_path / "bad", tiny_model(model_name), layers)
    source = lora.source(folder)
    broken(folder, **changes)  # since it was looked at
    engine = make_engine("llama", native=kernels)
    expected = greedy(engine)
    with pytest.raises(ModelLoadFailed, match=f"Adapter 'bad'.*{message}"):
        engine.adapted(source)
    assert engine.stats().adapters == ()
    assert greedy(engine) == expected


def test_a_visit_sees_the_model_with_the_adapter(make_engine, adapters, kernels):
    engine = make_engine("llama", native=kernels)
    adapted = engine.adapted(adapters[0])

    def last(model):
        return (
            model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1].argmax().item()
        )

    assert adapted.call(last).result() == greedy(adapted, count=1)[0][0]
    assert engine.call(last).result() == greedy(engine, count=1)[0][0]


def test_a_closed_engine_takes_no_adapter(make_engine, adapters):
    engine = make_engine("llama")
    adapted = engine.adapted(adapters[0])
    engine.close()
    with pytest.raises(ModelUnloaded):
        engine.adapted(adapters[1])
    assert read(adapted.submit([ask(PROMPT)]))[0][0].error is not None
    adapted.close()


def test_several_answers_to_one_prompt_share_an_adapter(make_engine, adapters, kernels):
    engine = make_engine("llama", native=kernels)
    adapted = engine.adapted(adapters[0])
    request = ask(PROMPT, max_tokens=10, seed=4, ignore_eos=True)
    answers = complete(adapted, request, request, request)
    assert answers == complete(adapted, request) * 3
    assert answers[:1] != complete(engine, request)


def test_the_config_of_a_saved_adapter_is_what_peft_writes(tmp_path):
    folder = lora.adapter(tmp_path / "a", tiny_model("llama"))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_serves_adapters_and_base_in_one_batch(make_engine, adapters):
    engine = make_engine("llama", device="cuda", native=None, num_slots=8)
    engines = [engine, *(engine.adapted(each) for each in adapters)]
    request = ask(PROMPT, max_tokens=12, **GREEDY)
    alone = [complete(own, request)[0] for own in engines]
    plain = make_engine("llama", native=None)
    assert alone[1] == complete(plain.adapted(adapters[0]), request)[0]
    streams = [own.submit([request]) for own in engines]
    assert [tokens(stream)[0] for stream in streams] == alone


@pytest.mark.parametrize("name", ["mamba", "conv-hybrid"])
def test_states_of_recurrent_layers_are_an_adapters_own(make_engine, tmp_path, kernels, name):
    layers = ["in_proj", "out_proj"]
    engine = make_engine(name, native=kernels)
    own = engine.adapted(lora.source(lora.adapter(tmp_path / "a", tiny_model(name), layers)))
    alone = [greedy(engine), greedy(own)]
    request = ask(PROMPT, max_tokens=12, **GREEDY)
    streams = [each.submit([request]) for each in (engine, own, engine)]
    assert [tokens(stream) for stream in streams] == [alone[0], alone[1], alone[0]]
    assert alone[0] != alone[1]


class EverySecond(torch.nn.Module):
    """A layer that every second token goes through, as some do through an expert."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        made = x.new_zeros(*x.shape[:-1], self.inner.out_features)
        made[:, ::2] = self.inner(x[:, ::2])
        return made


def test_a_layer_that_some_tokens_pass_by_is_not_adapted():
    whole = copy.deepcopy(tiny_model("llama"))
    layer = whole.model.layers[0].mlp
    layer.down_proj = EverySecond(layer.down_proj)
    paths = read_by_every_token(whole)
    assert "model.layers.0.mlp.down_proj.inner" not in paths
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"} <= paths

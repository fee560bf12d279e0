"""Models that are unloaded and come back: with the same bits, or they are loaded anew."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.models import prompts_of, tiny_model
from tests.engine.reading import GREEDY, ask, read
from tests.repeats import slow
from transformers_api.engine import loader
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native.convert_model import packed_bytes
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.engine.standby import StandbyModels
from transformers_api.errors import ModelLoadFailed

ASKED = [ask(prompt, max_tokens=8, **GREEDY, logprobs=0) for prompt in prompts_of(3)]


@pytest.fixture
def load(engine_thread, native_cache, monkeypatch):
    """load(folder, **options): a running engine; ``load.anew`` says how many were not woken up."""
    standby, honest = StandbyModels(2), loader.make_model

    def make_model(*args):
        load.anew += 1
        return honest(*args)

    def load(folder, **options):
        options = {"num_slots": 2, "native": native_cache, "standby": standby} | options
        return engine_thread.call(
            lambda: load_engine(folder, LoadOptions(**options), engine_thread)
        ).result()

    load.anew = 0
    monkeypatch.setattr(loader, "make_model", make_model)
    return load


def saved(name, folder):
    tiny_model(name).save_pretrained(folder)
    return folder


def bits(engine):
    """Its tokens and scores, to the bit; it is closed then.

    Of one submit, so that also torch has products of the same shapes every time.
    """
    outputs = read(engine.submit(ASKED))
    engine.close()
    return [[(o.token_id, o.score) for o in outputs[index]] for index in sorted(outputs)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gpt2", {"dtype": "bfloat16"}),
        ("qwen3", {"quantization": "int8"}),
        *slow(("gpt2", {}), ("gemma3", {}), ("opt", {})),
    ],
)
def test_a_model_that_slept_says_the_same_bits_and_is_not_loaded_anew(
    load, tmp_path, name, options
):
    folder = saved(name, tmp_path)
    wanted = bits(load(folder, **options))
    assert bits(load(folder, **options)) == wanted
    assert bits(load(folder, **options)) == wanted
    assert load.anew == 1


def test_a_model_of_several_files_wakes_up(load, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert bits(load(tmp_path)) == bits(load(tmp_path))
    assert load.anew == 1


def test_a_model_that_sleeps_has_no_weights_and_no_cache(load, tmp_path):
    engine = load(saved("llama", tmp_path))
    model, cache = engine.model, innermost(engine.runner).cache
    bits(engine)
    assert packed_bytes(model) == cache.bytes == 0
    engine = load(tmp_path)
    assert engine.model is model
    assert packed_bytes(model) > 0
    engine.close()


def test_a_cache_budget_of_one_residence_does_not_bind_the_next(load, tmp_path):
    folder = saved("llama", tmp_path)
    wide = load(folder)
    window = wide.max_model_len
    wide.close()
    narrow = load(folder)
    innermost(narrow.runner).cache.set_budget(1)  # as where little memory was free
    narrow.close()
    again = load(folder)
    assert again.max_model_len == innermost(again.runner).cache.max_length == window
    again.close()


@pytest.mark.parametrize("other", [{"stamp": 2}, {"quantization": "int8"}, {"num_slots": 3}])
def test_other_files_or_options_are_loaded_anew(load, tmp_path, other):
    folder = saved("llama", tmp_path)
    bits(load(folder, stamp=1))
    bits(load(folder, **{"stamp": 1} | other))
    assert load.anew == 2


def change(folder, what):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(what(weights), path, metadata={"format": "pt"})


def test_weights_that_changed_under_the_same_stamp_are_noticed(load, tmp_path, caplog):
    folder = saved("llama", tmp_path)
    before = bits(load(folder))
    change(folder, lambda weights: {name: weight * 1.5 for name, weight in weights.items()})
    with caplog.at_level(logging.WARNING):
        after = bits(load(folder))
    assert after != before
    assert load.anew == 2
    assert "loaded anew" in caplog.text
    assert bits(load(folder)) == after
    assert load.anew == 2


def test_a_file_whose_weights_have_another_size_is_noticed(load, tmp_path):
    folder = saved("llama", tmp_path)
    bits(load(folder))
    change(folder, lambda w: w | {"model.layers.1.mlp.down_proj.weight": torch.zeros(32, 63)})
    with pytest.raises(ModelLoadFailed):
        load(folder)
    assert load.anew == 2


def test_only_the_models_that_were_used_last_sleep(load, tmp_path):
    models = []
    for name in ("llama", "gpt2", "opt"):
        engine = load(saved(name, tmp_path / name))
        models.append(weakref.ref(engine.model))
        engine.close()
        del engine
    gc.collect()
    assert [model() is not None for model in models] == [False, True, True]


def test_a_model_whose_larger_part_is_not_packed_does_not_sleep(load, tmp_path, monkeypatch):
    from transformers_api.engine.native import standby

    monkeypatch.setattr(standby, "LARGEST_REST", 100)
    folder = saved("llama", tmp_path)
    assert bits(load(folder)) == bits(load(folder))
    assert load.anew == 2


def test_a_file_beside_a_model_is_none_of_its_own(load, tmp_path):
    folder = saved("llama", tmp_path)
    (folder / "adapter.safetensors").write_bytes(b"unfinished")
    assert bits(load(folder)) == bits(load(folder))
    assert load.anew == 1


def test_a_model_whose_files_have_other_names_wakes_up(load, tmp_path):
    folder = saved("gpt-neox", tmp_path)  # embed_out is lm_head since
    assert bits(load(folder)) == bits(load(folder))
    assert load.anew == 1


def test_a_model_without_kernels_does_not_sleep(load, tmp_path):
    folder = saved("rwkv", tmp_path)
    assert bits(load(folder)) == bits(load(folder))
    assert load.anew == 4  # each once more without the kernels, which refused it


FIRST = ask([5, 6, 7, 8, 9, 10, 11, 12], max_tokens=6, **GREEDY, logprobs=0)
ROOM = 1 << 20  # bytes of conversations


def said(engine, *requests):
    """(tokens from the cache, tokens and scores) of each request."""
    outputs = read(engine.submit(list(requests)))
    return [
        (outputs[index][0].cached_tokens, [(o.token_id, o.score) for o in outputs[index]])
        for index in sorted(outputs)
    ]


def going_on(answers, request=FIRST):
    """The next turn of a conversation: what was asked, what was answered, and more."""
    answer = [token for token, _ in answers[0][1]]
    return ask([*request.prompt_ids, *answer, 20, 21], max_tokens=6, **GREEDY, logprobs=0)


@pytest.fixture
def talk(load):
    """talk(folder, bytes): an engine whose conversations sleep with it, in one pool."""
    pools = {}

    def talk(folder, most=ROOM, **options):
        pool = pools.setdefault(most, StandbyModels(2, most))
        return load(folder, standby=pool, **options)

    talk.pools = pools
    return talk


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gpt2", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
        *slow(("gemma3", {})),
    ],
)
def test_a_conversation_goes_on_after_a_swap_and_is_not_read_again(talk, tmp_path, name, options):
    folder = saved(name, tmp_path)
    engine = talk(folder, **options)
    first = said(engine, FIRST)
    again = going_on(first)
    ((stayed, wanted),) = said(engine, again)
    engine.close()
    engine = talk(folder, 2 * ROOM, **options)  # another pool
    assert said(engine, FIRST) == first
    engine.close()
    engine = talk(folder, 2 * ROOM, **options)
    ((cached, answer),) = said(engine, again)
    engine.close()
    assert answer == wanted
    assert cached == stayed == len(FIRST.prompt_ids) + 5  # the last token is never read


def test_of_several_conversations_those_that_were_last_fit(talk, tmp_path):
    folder = saved("llama", tmp_path)
    others = [ask([30 + i, *range(40, 50)], max_tokens=3, **GREEDY) for i in range(2)]
    engine = talk(folder)
    for request in others:
        said(engine, request)
    token_bytes = innermost(engine.runner).cache.token_bytes
    engine.close()
    most = 13 * token_bytes  # 11 of the prompt, 2 of the answer
    engine = talk(folder, most)
    for request in others:
        said(engine, request)
    engine.close()
    engine = talk(folder, most)
    assert [said(engine, request)[0][0] for request in reversed(others)] == [10, 0]
    engine.close()


@pytest.mark.parametrize("most", [0, 100])
def test_without_room_no_conversation_is_kept(talk, tmp_path, most):
    folder = saved("llama", tmp_path)
    engine = talk(folder, most)
    first = said(engine, FIRST)
    engine.close()
    engine = talk(folder, most)
    assert said(engine, FIRST) == first  # of which nothing was cached
    engine.close()


def test_conversations_share_their_bound_among_models_and_can_be_given_back(talk, tmp_path):
    folders = [saved(name, tmp_path / name) for name in ("llama", "qwen3")]
    sizes = []
    for folder in folders:
        engine = talk(folder)
        said(engine, FIRST)
        sizes.append(13 * innermost(engine.runner).cache.token_bytes)
        engine.close()
    most = max(sizes)  # not both
    for folder in folders:
        engine = talk(folder, most)
        said(engine, FIRST)
        engine.close()
    engine = talk(folders[0], most)  # its conversation went for the other's
    assert said(engine, FIRST)[0][0] == 0
    engine.close()
    engine = talk(folders[0], most)  # and took the other's place
    assert said(engine, FIRST)[0][0] == len(FIRST.prompt_ids) - 1
    engine.close()
    talk.pools[most].forget_conversations()
    engine = talk(folders[0], most)
    assert said(engine, FIRST)[0][0] == 0
    engine.close()


def test_conversations_come_back_as_far_as_there_is_room_for_them(talk, tmp_path, monkeypatch):
    folder = saved("llama", tmp_path)
    requests = [ask([30 + i, *range(40, 60)], max_tokens=3, **GREEDY) for i in range(2)]
    engine = talk(folder)
    said(engine, requests[0])
    said(engine, requests[1])
    engine.close()
    monkeypatch.setattr(loader, "available_bytes", lambda device: 0)  # one row
    engine = talk(folder)
    assert said(engine, requests[1])[0][0] == 20
    assert said(engine, requests[0])[0][0] == 0
    engine.close()

from __future__ import annotations

import ctypes
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.models import tiny_model
from tests.engine.reading import read
from tests.engine.wrappers import save
from tests.tokenizers import byte_level
from transformers_api.config.settings import GIB, Settings
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.native import packed_weights
from transformers_api.engine.native.packed_store import PackedStore, StoredWeight
from transformers_api.engine.platform import memory
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import InsufficientMemory, ModelLoadFailed
from transformers_api.kernels.build import find
from transformers_api.kernels.modules.linear import NativeLinear
from transformers_api.model_loader import ModelLoader
from transformers_api.serving.models.capabilities import read_facts
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, PathSource
from transformers_api.serving.models.store import ModelStore


@pytest.fixture
def loader(tmp_path):
    thread = EngineThread(1)
    yield loader_for(thread, tmp_path, native_kernels=False)
    thread.stop()


@pytest.fixture
def native_loader(tmp_path, native_cache):
    thread = EngineThread(1)
    yield loader_for(thread, tmp_path, native_kernels=True, native_cache=native_cache)
    thread.stop()


def loader_for(thread, tmp_path, wake=lambda: None, **native):
    settings = Settings(
        model_store=tmp_path / "store",
        hf_home=tmp_path / "hub",
        max_inflight=2,
        torch_threads=1,
        **native,
    )
    return ModelLoader(settings, ModelStore(settings), thread, wake=wake)


@pytest.fixture
def spec(tmp_path):
    folder = tmp_path / "tiny"
    tiny_model("gpt2").save_pretrained(folder)
    byte_level(chat_template=None).save_pretrained(folder)  # the model has fewer tokens
    return ModelSpec(name="tiny", source=PathSource(folder), device="cpu")


def files(parameters, stored_dtype="bfloat16"):
    return ModelFiles(Path("nowhere"), parameters * 2, parameters, stored_dtype, 0)


def prepared(loader, spec):
    return loader.prepare(spec, lambda share, what: None)


def test_a_folder_becomes_a_resident_model(loader, spec):
    model = loader.load(spec, prepared(loader, spec))
    assert (model.device, model.dtype) == ("cpu", "float32")
    assert model.bytes == sum(p.nbytes for p in tiny_model("gpt2").parameters())
    assert model.engine.max_model_len == 128
    assert model.engine.vocab_size == 97  # the tokenizer has more, the model does not
    assert model.fingerprint.startswith("fp_")
    model.engine.close()


def reported(loader, spec):
    """What a load says of how far it is."""
    reports = []
    loader.load(
        spec, prepared(loader, spec), lambda share, text: reports.append((share, text))
    ).engine.close()
    return reports


@pytest.mark.parametrize(("most_mb", "left"), [(4, "cba"), (2, "ca"), (1, "c"), (0, "")])
def test_a_start_brings_packed_weights_under_a_bound_that_was_lowered(tmp_path, most_mb, left):
    store, weight = PackedStore.of(tmp_path / "store", 4), StoredWeight(0, 1, 1, 0.0, 0, 900_000, 0)
    assert store.make_room(weight.bytes)
    for used_at, key in enumerate("bac"):
        store.write(key, "model", [weight], [bytes(weight.bytes)])
        os.utime(store.path(key), (used_at, used_at))
    (store.folder / "another file").touch()
    thread = EngineThread(1)
    loader_for(thread, tmp_path, packed_store_mb=most_mb)
    thread.stop()
    assert {entry.path.stem for entry in store.entries()} == {*left}
    assert (store.folder / "another file").is_file()


def test_how_far_a_load_is_moves_on_with_every_weight_and_every_packed_layer(native_loader, spec):
    reports = reported(native_loader, spec)
    shares = [share for share, _ in reports]
    assert shares == sorted(shares)
    assert (shares[0] > 0, shares[-1] >= 0.7) == (True, True)
    assert len(set(shares)) > 20
    assert list(dict.fromkeys(text for _, text in reports)) == [
        "reading the weights",
        "checking the weights",
        "packing the weights",
    ]


def test_where_nothing_is_packed_the_weights_that_were_read_count(loader, spec):
    reports = reported(loader, spec)
    assert len({share for share, _ in reports}) > 20
    assert {text for _, text in reports} == {"reading the weights", "checking the weights"}


def test_the_words_of_a_model_are_had_without_its_weights(loader, spec, tmp_path):
    words = loader.text(spec)
    assert (words.vocab_size, words.max_model_len) == (97, 128)
    assert words.template.source == ""
    assert loader.text(spec) is words
    assert loader.thread.engines == []
    file = tmp_path / "tiny" / "tokenizer_config.json"
    file.write_bytes(file.read_bytes())
    assert loader.text(spec) is not words  # its files have changed
    model = loader.load(spec, prepared(loader, spec))
    assert (model.vocab_size, model.max_model_len) == (words.vocab_size, words.max_model_len)
    assert model.tokenizer.encode("Hello") == words.tokenizer.encode("Hello")
    model.engine.close()


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_is_the_models(loader, tmp_path, name):
    folder = tmp_path / "seeing"
    whole = save("smolvlm", folder, as_published=True)
    byte_level(chat_template=None).save_pretrained(folder)
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}|"
    (folder / name).write_text(json.dumps({"chat_template": template + "{% endfor %}"}))
    spec = ModelSpec(name="seeing", source=PathSource(folder), device="cpu")
    words = loader.text(spec)
    turns = [{"role": "user", "content": "AB"}, {"role": "assistant", "content": "C"}]
    assert words.template.render(turns, add_generation_prompt=False, kwargs={}) == "AB|C|"
    assert read_facts(folder).template == template + "{% endfor %}"
    files = prepared(loader, spec)
    assert 0 < files.parameters < sum(p.numel() for p in whole.parameters())
    model = loader.load(spec, files)
    assert model.bytes == files.parameters * 4
    model.engine.close()


def test_words_that_were_tokenized_once_take_no_memory(loader, spec):
    model = loader.load(spec, prepared(loader, spec))
    model.engine.close()
    encode = model.tokenizer.encode
    for number in range(500):
        encode(f"warm{number:036d}")
    before = allocated_bytes()
    for number in range(5000):  # one of them would take a kilobyte and more
        encode(f"{number:040d}")
    assert allocated_bytes() - before < 5000 * 200


class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated_bytes():
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("the C library does not tell")
    mallinfo2.restype = Mallinfo2
    return mallinfo2().uordblks


def test_the_fingerprint_changes_with_the_dtype_and_not_with_time(loader, spec):
    models = [
        loader.load(each, prepared(loader, each))
        for each in (spec, spec, replace(spec, dtype="bfloat16"))
    ]
    one, again, other = (model.fingerprint for model in models)
    assert one == again != other
    for model in models:
        model.engine.close()


def test_a_model_that_comes_back_is_the_one_that_was_there(native_loader, spec):
    first = native_loader.load(spec, prepared(native_loader, spec))
    model = first.engine.model
    first.engine.close()
    again = native_loader.load(spec, prepared(native_loader, spec))
    assert again.engine.model is model
    assert again.tokenizer is first.tokenizer
    assert again.inspector.anatomy == first.inspector.anatomy
    assert (again.fingerprint, again.bytes) == (first.fingerprint, first.bytes)
    again.engine.close()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_was_written_again_is_read_again(native_loader, spec, tmp_path, name):
    first = native_loader.load(spec, prepared(native_loader, spec))
    model = first.engine.model
    first.engine.close()
    file = tmp_path / "tiny" / name
    file.write_bytes(file.read_bytes())
    again = native_loader.load(spec, prepared(native_loader, spec))
    assert again.engine.model is not model
    assert again.tokenizer is not first.tokenizer
    again.engine.close()


def test_with_no_sleeping_models_every_load_is_a_whole_one(tmp_path, native_cache, spec):
    thread = EngineThread(1)
    native = {"native_kernels": True, "native_cache": native_cache}
    loader = loader_for(thread, tmp_path, sleeping_models=0, **native)
    first = loader.load(spec, prepared(loader, spec))
    model = first.engine.model
    first.engine.close()
    again = loader.load(spec, prepared(loader, spec))
    assert again.engine.model is not model
    assert again.tokenizer is not first.tokenizer
    again.engine.close()
    thread.stop()


@pytest.mark.parametrize("template", ["{{ (10 ** 9) ** (10 ** 7) }}", "{{ 1 | no_such_filter }}"])
def test_a_template_that_never_works_is_told_at_load(loader, tmp_path, spec, caplog, template):
    byte_level(chat_template=template).save_pretrained(tmp_path / "tiny")
    model = loader.load(spec, loader.prepare(spec, lambda share, text: None))
    try:
        assert "The chat template of tiny cannot be used" in caplog.text
        assert model.template.fault in caplog.text
    finally:
        model.engine.close()


def test_a_folder_without_a_tokenizer_is_a_failed_load(loader, spec, tmp_path):
    ready = prepared(loader, spec)
    for path in (tmp_path / "tiny").glob("tokenizer*"):
        path.write_text("{")
    with pytest.raises(ModelLoadFailed, match="tokenizer"):
        loader.load(spec, ready)


def test_memory_is_checked_against_what_is_free_and_what_would_be_freed(loader, spec, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10 * GIB)
    billion = files(10**9)  # 3.7 GiB in float32, 4.3 with the reserve
    assert loader.check_memory(spec, billion, freed_bytes=0)
    two = files(2 * 10**9)  # 8.6 GiB: fits, but not with a fifth to spare
    assert not loader.check_memory(spec, two, freed_bytes=0)
    three = files(3 * 10**9)
    with pytest.raises(InsufficientMemory, match=r"needs 12\.9 GiB .* 10\.0 GiB can be had"):
        loader.check_memory(spec, three, freed_bytes=0)
    assert not loader.check_memory(spec, three, freed_bytes=4 * GIB)


def test_the_dtype_that_is_served_counts_and_not_the_stored_one(loader, spec, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * GIB)
    billion = files(10**9, "float32")
    with pytest.raises(InsufficientMemory):
        loader.check_memory(spec, billion, freed_bytes=0)
    assert loader.check_memory(replace(spec, dtype="bfloat16"), billion, freed_bytes=0)


def test_nobody_waits_for_kernels_and_who_went_without_them_becomes_outdated(
    tmp_path, spec, native_cache, monkeypatch
):
    go, folder = tmp_path / "go", tmp_path / "bin"
    os.mkfifo(go)
    folder.mkdir()
    slow = folder / "g++"
    slow.write_text(
        f'#!/bin/sh\nread -r line <{go}; for to; do :; done; cp {find(native_cache)} "$to"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    thread = EngineThread(1)
    woken = threading.Event()
    loader = loader_for(thread, tmp_path, woken.set, native_cache=tmp_path / "kernels")
    without = loader.load(spec, prepared(loader, spec))
    assert not without.is_outdated()
    assert not runs_on_kernels(without)
    go.write_text("on\n")
    assert woken.wait(20)
    assert without.is_outdated()
    anew = loader.load(spec, prepared(loader, spec))
    assert runs_on_kernels(anew)
    assert not anew.is_outdated()
    for model in (without, anew):
        model.engine.close()
    thread.stop()


def runs_on_kernels(model):
    kinds = model.engine.call(lambda model: {type(each) for each in model.modules()}).result()
    return NativeLinear in kinds


def test_the_devices_are_told_without_waiting(loader):
    assert "cpu" in loader.devices()


def test_free_memory_is_a_plausible_number():
    assert 0 < memory.available_bytes("cpu") < 1 << 50


@pytest.fixture
def stored(native_loader, spec, monkeypatch):
    """(loader, specification) of a model whose packed weights are in the store."""
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)
    model = native_loader.load(spec, prepared(native_loader, spec))
    join_writers()  # what is unloaded before is not stored
    model.engine.close()
    return native_loader, spec


def join_writers():
    for thread in threading.enumerate():
        if thread.name == "packed writer":
            thread.join()


def test_a_model_whose_packed_weights_are_stored_needs_the_memory_that_they_take(
    stored, monkeypatch
):
    loader, spec = stored
    (entry,) = loader._packed.entries()
    assert entry.model == "tiny"
    size = loader._packed.size(entry.path.stem)
    need = int(size * 1.15)
    own = prepared(loader, spec)
    assert own.parameters * 2 != size
    monkeypatch.setattr(memory, "free_bytes", lambda: need - 1)
    with pytest.raises(InsufficientMemory):
        loader.check_memory(spec, own, 0)
    loader.check_memory(spec, own, 1)
    loader._packed.read_ahead(entry.path.stem)  # it has taken its memory already
    monkeypatch.setattr(memory, "free_bytes", lambda: need - size)
    loader.check_memory(spec, own, 0)
    monkeypatch.setattr(memory, "free_bytes", lambda: need - size - 1)
    with pytest.raises(InsufficientMemory):
        loader.check_memory(spec, own, 0)
    assert loader._packed.ahead_bytes(entry.path.stem) == 0  # nobody is going to take it


def test_a_model_that_lacks_memory_takes_that_of_conversations(loader, spec, monkeypatch):
    free = [GIB, 9 * GIB]
    loader._standby.keep("another", SimpleNamespace(sleep=lambda: None), [SimpleNamespace(bytes=1)])
    monkeypatch.setattr(memory, "available_bytes", lambda device: free.pop(0))
    loader.check_memory(spec, files(10**9), 0)
    assert not loader._standby.conversations("another")


def test_a_model_whose_file_was_written_again_is_not_served_from_what_was_packed(stored, tmp_path):
    loader, spec = stored
    path = tmp_path / "tiny" / "model.safetensors"
    weights = load_file(path)
    before = loader.load(spec, prepared(loader, spec))
    probe = SequenceRequest([5, 6], SamplingParams(max_tokens=1, logprobs=0))
    scores = [read(before.engine.submit([probe]))[0][0].score]
    before.engine.close()
    times = path.stat()
    save_file({k: v * 1.5 for k, v in weights.items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))  # of the same size
    after = loader.load(spec, prepared(loader, spec))
    scores.append(read(after.engine.submit([probe]))[0][0].score)
    join_writers()  # what is unloaded before is not stored
    after.engine.close()
    assert scores[0] != scores[1]
    assert len(loader._packed.entries()) == 2


def test_a_process_that_starts_reads_what_was_packed_ahead(stored, tmp_path, native_cache):
    loader, spec = stored
    (entry,) = loader._packed.entries()
    thread, gate = EngineThread(1), threading.Event()
    thread.call(gate.wait)
    starting = loader_for(thread, tmp_path, native_kernels=True, native_cache=native_cache)
    own = prepared(starting, spec)  # while torch is imported
    assert starting._packed.ahead_bytes(entry.path.stem) > 0
    gate.set()
    starting.load(spec, own).engine.close()
    assert starting._packed.ahead_bytes(entry.path.stem) == 0
    thread.stop()


def test_with_native_kernels_the_facts_are_those_of_the_packed_weights(native_loader, spec):
    plain = sum(p.nbytes for p in tiny_model("gpt2").parameters())
    exact = native_loader.load(spec, prepared(native_loader, spec))
    assert exact.dtype == "float32"
    assert exact.bytes >= plain * 0.9
    exact.engine.close()
    halved = native_loader.load(replace(spec, dtype="bfloat16"), prepared(native_loader, spec))
    assert halved.dtype == "bfloat16"
    assert halved.bytes < exact.bytes
    halved.engine.close()


def test_with_native_kernels_a_large_model_needs_two_bytes_per_weight(
    native_loader, spec, monkeypatch
):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * GIB)
    for stored in ("bfloat16", "float32"):
        native_loader.check_memory(spec, files(10**9, stored), freed_bytes=0)
        with pytest.raises(InsufficientMemory):
            native_loader.check_memory(spec, files(2 * 10**9, stored), freed_bytes=0)
    with pytest.raises(InsufficientMemory):
        native_loader.check_memory(
            replace(spec, dtype="float32"), files(10**9, "bfloat16"), freed_bytes=0
        )


def test_a_quantised_checkpoint_needs_the_memory_of_its_width(native_loader, spec, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 * GIB)
    quantized = files(10**9, "gptq")
    narrow = replace(quantized, file_types={"int4": 8 * 10**8, "F16": 10**8})
    native_loader.check_memory(spec, narrow, freed_bytes=0)
    for other, own in (
        (replace(quantized, file_types={"int8": 10**9}), spec),
        (narrow, replace(spec, quantization="none")),
    ):
        with pytest.raises(InsufficientMemory):
            native_loader.check_memory(own, other, freed_bytes=0)


def test_code_of_a_models_own_needs_the_memory_of_all_its_numbers(native_loader, spec, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * GIB)
    narrow, whole = replace(spec, quantization="int8"), files(10**9)
    native_loader.check_memory(narrow, whole, freed_bytes=0)
    with pytest.raises(InsufficientMemory):
        native_loader.check_memory(narrow, replace(whole, has_own_code=True), freed_bytes=0)


def test_narrow_weights_need_less_memory(native_loader, spec, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 * GIB)
    for quantization, parameters in (("int8", 8 * 10**8), ("int4", 10**9)):
        narrow = replace(spec, quantization=quantization)
        native_loader.check_memory(narrow, files(parameters), freed_bytes=0)
        with pytest.raises(InsufficientMemory):
            native_loader.check_memory(spec, files(parameters), freed_bytes=0)
        with pytest.raises(InsufficientMemory):
            native_loader.check_memory(narrow, files(parameters * 3 // 2), freed_bytes=0)

"""Packed weights on the disk: the next load reads them, and nothing else than what was packed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import transformers as tf

from tests.engine.models import prompts_of, tiny_model
from tests.engine.native.test_stored_weights import PEAK, SIZES, model_of
from tests.engine.reading import GREEDY, ask, read
from tests.repeats import slow
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native import packed_store, packed_weights
from transformers_api.engine.native.convert_model import packed_weights as weights_of
from transformers_api.engine.native.packed_store import PackedStore, StoredWeight, packed_key
from transformers_api.engine.native.packed_weights import PackedFile
from transformers_api.engine.standby import StandbyModels
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.packing import PackingThread

ASKED = [ask(prompt, max_tokens=6, **GREEDY, logprobs=0) for prompt in prompts_of(3)]
ROOM = 1 << 30


@pytest.fixture
def load(engine_thread, native_cache, tmp_path, monkeypatch):
    """load(folder, **options): a running engine, once all is written that is going to be.

    ``load.packed``: how many matrices were packed by all loads so far.
    """
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)
    honest, beside = PackedWeight._put, PackingThread.add

    def put(self, *args):
        load.packed += 1
        honest(self, *args)

    def add(self, *args):
        is_added = beside(self, *args)
        load.packed += is_added
        return is_added

    def load(folder, **options):
        options = {"num_slots": 3, "native": native_cache, "stamp": str(folder)} | options
        options = {"plans": tmp_path / "plans", "dtype": "bfloat16"} | options
        own = LoadOptions(**options)
        if "packed" not in options:
            file = PackedFile(load.store, packed_key(own, folder), folder.name)
            own = replace(own, packed=file)
        engine = engine_thread.call(lambda: load_engine(folder, own, engine_thread)).result()
        for thread in threading.enumerate():
            if thread.name == "packed writer":
                thread.join()
        return engine

    load.packed = 0
    load.store = PackedStore(tmp_path / "packed", ROOM)
    monkeypatch.setattr(PackedWeight, "_put", put)
    monkeypatch.setattr(PackingThread, "add", add)
    return load


def saved(name, folder):
    tiny_model(name).save_pretrained(folder)
    return folder


def bits(engine):
    outputs = read(engine.submit(ASKED))
    engine.close()
    return [[(o.token_id, o.score) for o in outputs[index]] for index in sorted(outputs)]


def files(load):
    return sorted(path.name for path in load.store.folder.iterdir())


def only(load):
    (path,) = load.store.folder.iterdir()
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("qwen3", {"quantization": "int8"}),
        ("mixtral", {}),
        ("conv-hybrid", {}),
        *slow(("gpt2", {"dtype": "float32"}), ("gemma3", {}), ("opt", {"plans": None})),
    ],
)
def test_a_model_that_was_served_before_is_not_packed_again_and_says_the_same(
    load, tmp_path, name, options
):
    folder = saved(name, tmp_path / "model")
    first = bits(load(folder, **options))
    packed = load.packed
    assert packed > 0
    assert only(load).name.endswith(".packed")
    assert bits(load(folder, **options)) == first
    assert load.packed == packed
    assert bits(load(folder, **options, packed=None)) == first
    assert load.packed == 2 * packed


def test_a_model_that_sleeps_wakes_up_with_them(load, tmp_path):
    folder, standby = saved("llama", tmp_path / "model"), StandbyModels(1)
    first, packed = bits(load(folder, standby=standby)), load.packed
    assert bits(load(folder, standby=standby)) == first
    assert load.packed == packed
    only(load).unlink()
    assert bits(load(folder, standby=standby)) == first
    assert load.packed == 2 * packed
    assert only(load).is_file()  # stored again


def test_what_a_load_had_to_measure_is_stored_too(load, tmp_path):
    folder = saved("llama", tmp_path / "model")
    options = {"quantization": "int4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_api.engine.native.convert_model.INT4_MOST_LOST", 1.0)
        engine = load(folder, **options)
        losses = _losses(engine)
        engine.close()
        engine = load(folder, **options)
    assert _losses(engine) == losses
    assert max(losses) > 0
    engine.close()


def _losses(engine):
    return [weight.error for weight in weights_of(engine.model)]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -1),  # the end of the last weight
        lambda path: flip(path, packed_store.PAGE),  # the beginning of the first
        lambda path: flip(path, 60),  # the header
        lambda path: cut(path, -1),
        lambda path: cut(path, 3),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + bytes(64)),
    ],
)
def test_a_damaged_file_is_noticed_and_made_again(load, tmp_path, caplog, damage):
    folder = saved("llama", tmp_path / "model")
    first, packed = bits(load(folder)), load.packed
    whole = only(load).read_bytes()
    damage(only(load))
    assert bits(load(folder)) == first
    assert load.packed == 2 * packed
    assert "Damaged packed weights" in caplog.text
    assert only(load).read_bytes() == whole


def test_a_file_of_another_model_is_not_used(load, tmp_path):
    folders = [saved(name, tmp_path / name) for name in ("llama", "qwen3")]
    wanted = bits(load(folders[0]))
    own = only(load)
    other = own.read_bytes()
    own.unlink()
    engine = load(folders[1])
    path = only(load)
    said = bits(engine)
    path.write_bytes(other)  # under the name of the second
    assert bits(load(folders[1])) == said != wanted


def test_weights_that_fit_no_more_are_packed_anew(load, tmp_path, monkeypatch):
    """As where a key had forgotten something: what is stored has to fit the model, and to say so."""
    folder = saved("llama", tmp_path / "model")
    file = PackedFile(load.store, "0" * 32, "forgetful")
    first = bits(load(folder, packed=file))
    other = bits(load(folder, packed=file, quantization="int8", stamp=2))
    assert other != first
    assert bits(load(folder, packed=file, quantization="int8", stamp=2)) == other


@pytest.mark.parametrize(
    "other",
    [
        {"stamp": 2},
        {"quantization": "int8"},
        {"dtype": "float32"},
        {"native_isa": "avx2"},
    ],
)
def test_other_files_or_options_have_other_packed_weights(native_cache, tmp_path, other):
    options = LoadOptions(native=native_cache, stamp=1, dtype="bfloat16")
    key = packed_key(options, tmp_path)
    assert key == packed_key(replace(options, num_slots=7), tmp_path)
    assert packed_key(replace(options, **other), tmp_path) not in (None, key)
    assert packed_key(options, tmp_path / "model") != key


@pytest.mark.parametrize(
    "other", [{"native": None}, {"stamp": None}, {"trust_remote_code": True}, {"device": "cuda"}]
)
def test_what_the_kernels_do_not_run_or_nobody_can_name_is_not_stored(
    native_cache, tmp_path, other
):
    options = LoadOptions(native=native_cache, stamp=1)
    assert packed_key(replace(options, **other), tmp_path) is None


def test_the_next_version_of_the_program_packs_anew(native_cache, tmp_path, monkeypatch):
    options = LoadOptions(native=native_cache, stamp=1)
    key = packed_key(options, tmp_path)
    monkeypatch.setattr(packed_store, "program", lambda: "the next version")
    assert packed_key(options, tmp_path) not in (None, key)


def test_the_store_stays_within_its_bound_and_keeps_what_was_used_last(load, tmp_path):
    folders = [saved("llama", tmp_path / str(number)) for number in range(3)]
    for number, folder in enumerate(folders[:2]):
        load(folder).close()
        if number == 0:
            size = only(load).stat().st_size
            load.store.most_bytes = 2 * size
    paths = {entry.model: entry.path for entry in load.store.entries()}
    for age, name in enumerate(("0", "1")):
        os.utime(paths[name], (1000 - age, 1000 - age))  # the second was used before the first
    load(folders[0]).close()
    load(folders[2]).close()
    assert sorted(entry.model for entry in load.store.entries()) == ["0", "2"]


@pytest.mark.parametrize("most", [0, 1000])
def test_a_model_that_is_larger_than_the_store_is_not_stored(load, tmp_path, most):
    load.store.most_bytes = most
    folder = saved("llama", tmp_path / "model")
    assert bits(load(folder)) == bits(load(folder))
    assert not load.store.folder.exists()


def test_half_of_the_disk_that_is_free_stays_free(tmp_path, monkeypatch):
    store = PackedStore(tmp_path / "packed", ROOM)
    usage = packed_store.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packed_store.shutil, "disk_usage", lambda _: usage._replace(free=1_999_999))
    assert store.make_room(999_999)
    assert not store.make_room(1_000_000)


def test_servers_that_write_the_same_weights_at_once_leave_one_whole_file(tmp_path):
    stores = [PackedStore(tmp_path, ROOM) for _ in range(2)]
    content = [bytes([number]) * 64 for number in range(2)]
    weights = [StoredWeight(0, 2, 3, 0.0, 64 * number, 64, 0) for number in range(2)]

    def parts():
        yield content[0]
        stores[1].write("a" * 32, "model", weights, content)
        yield content[1]

    stores[0].write("a" * 32, "model", weights, parts())
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 32 + ".packed"]
    for store in stores:
        made = store.read("a" * 32, threads=1)
        assert made.memory[made.start : made.start + 128] == b"".join(content)


def test_what_another_server_has_stored_meanwhile_is_not_written_again(load, tmp_path):
    engine = load(saved("llama", tmp_path / "model"))
    weights, stored = weights_of(engine.model), only(load).stat()
    file = PackedFile(PackedStore(load.store.folder, ROOM), only(load).stem, "model")
    file.write_later(weights[0].library, weights).join()
    assert (only(load).stat().st_ino, only(load).stat().st_mtime_ns) == (
        stored.st_ino,
        stored.st_mtime_ns,
    )
    engine.close()


def test_what_another_server_removes_once_it_is_read_is_used_all_the_same(load, tmp_path, caplog):
    folder = saved("llama", tmp_path / "model")
    first, packed = bits(load(folder)), load.packed
    path = only(load)
    load.store.read_ahead(path.stem)
    for thread in threading.enumerate():
        if thread.name == "reader":
            thread.join()
    path.unlink()
    assert bits(load(folder)) == first
    assert load.packed == packed
    assert bits(load(folder)) == first  # and what is removed before it is read is packed again
    assert load.packed == 2 * packed
    assert "Damaged" not in caplog.text


def test_a_disk_that_is_full_keeps_nothing_half_written_and_nobody_from_an_answer(load, tmp_path):
    folder, honest = saved("llama", tmp_path / "model"), os.pwrite

    def full(file, data, offset):
        if offset > packed_store.PAGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(file, data[:100], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        first = bits(load(folder))
    assert files(load) == []
    assert bits(load(folder)) == first
    assert only(load).name.endswith(".packed")


def test_what_was_stored_under_a_larger_bound_is_read_and_goes_with_the_next(load, tmp_path):
    folders = [saved("llama", tmp_path / str(number)) for number in range(2)]
    first, packed = bits(load(folders[0])), load.packed
    load.store.most_bytes = only(load).stat().st_size - 1
    assert bits(load(folders[0])) == first
    assert load.packed == packed
    larger = only(load)
    load(folders[1]).close()  # as large, header and all: it is not stored
    assert only(load) == larger
    load(folders[1], quantization="int8").close()
    assert only(load) != larger


def test_what_a_process_left_half_written_goes_with_time(tmp_path):
    store = PackedStore(tmp_path, ROOM)
    old, new = tmp_path / ".a.1.partial", tmp_path / ".b.2.partial"
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (1000, 1000))
    assert store.make_room(1)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


def test_what_is_read_ahead_is_read_once_and_takes_its_memory_from_then_on(load, tmp_path):
    folder = saved("llama", tmp_path / "model")
    first, packed = bits(load(folder)), load.packed
    key, store = only(load).stem, load.store
    assert store.ahead_bytes(key) == 0 < store.size(key)
    store.read_ahead(key)
    assert store.ahead_bytes(key) == store.size(key)
    assert store.ahead_bytes("another") == store.ahead_bytes(None) == 0
    assert bits(load(folder)) == first
    assert load.packed == packed
    assert store.ahead_bytes(key) == 0


def test_nothing_is_read_ahead_without_memory_for_it(load, tmp_path, monkeypatch):
    load(saved("llama", tmp_path / "model")).close()
    key, store = only(load).stem, load.store
    monkeypatch.setattr(packed_store, "free_bytes", lambda: store.size(key))
    store.read_ahead(key)
    assert store.ahead_bytes(key) == 0


def test_what_was_read_ahead_for_another_model_is_given_up(load, tmp_path):
    folders = [saved("llama", tmp_path / str(number)) for number in range(2)]
    load(folders[0]).close()
    key = only(load).stem
    load.store.read_ahead(key)
    load(folders[1]).close()
    assert load.store.ahead_bytes(key) == 0


@pytest.mark.slow  # two processes and a model of some size
def test_a_load_from_packed_weights_takes_little_more_memory_than_they_do(tmp_path, native_cache):
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    model_of(tf.LlamaConfig(**SIZES | wide)).bfloat16().save_pretrained(tmp_path / "model")
    folders = [str(folder) for folder in (tmp_path / "model", native_cache)]
    store = tmp_path / "packed"
    for _ in range(2):  # packed, and from what was packed
        child = subprocess.run(
            [sys.executable, "-c", PEAK, *folders, "int8", str(store)],
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert child.returncode == 0, child.stderr
        served, taken = map(int, child.stdout.split())
        assert taken < 1.1 * served + (100 << 20)
        (file,) = store.iterdir()
        assert served > 100 << 20 < file.stat().st_size

"""Files of tensors by owner and name: what comes back, what is refused, who has to make room."""

from __future__ import annotations

import os

import numpy
import pytest

from transformers_api.errors import InsufficientStorage, NotFound, PayloadTooLarge
from transformers_api.serving.inspect import tensor_store
from transformers_api.serving.inspect.tensor_store import TensorStore

ROWS = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)


def tensors(numbers):
    return {"a": numpy.zeros(numbers, numpy.float32)}


def test_what_is_put_comes_back_and_is_forgotten(tmp_path):
    store = TensorStore(tmp_path, "lens", 1 << 20)
    assert store.put("me", "x", {"kind": "tuned"}, {"a": ROWS, "b": ROWS[:, ::2]})
    assert not store.put("me", "x", {"kind": "jacobian"}, {"a": ROWS, "b": ROWS[:, ::2]})
    stored = TensorStore(tmp_path, "lens", 1 << 20).get("me", "x")  # after a restart
    assert stored.meta["kind"] == "jacobian"
    assert numpy.array_equal(stored.tensors["a"], ROWS)
    assert numpy.array_equal(stored.tensors["b"], ROWS[:, ::2])
    assert list(store.of("me")) == ["x"]
    assert store.of("me")["x"]["bytes"] > 40
    with pytest.raises(NotFound, match="No lens 'x' in the store; there is none"):
        store.get("you", "x")
    with pytest.raises(NotFound, match="there are: x"):
        store.get("me", "y")
    store.delete("me", "x")
    assert store.of("me") == {}
    assert numpy.array_equal(stored.tensors["a"], ROWS)  # whoever has it has it


def test_the_digest_is_of_the_numbers(tmp_path):
    store = TensorStore(tmp_path, "sae", 1 << 20)
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS + 1), ("d", ROWS.reshape(3, 2))):
        store.put("me", name, {}, {"a": rows})
    a, b, c, d = (store.get("me", name).digest for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_an_owner_has_so_many_and_so_many_bytes(tmp_path):
    store = TensorStore(tmp_path, "lens", 4000, most=2)
    store.put("me", "a", {}, tensors(900))
    store.put("me", "b", {}, tensors(900))
    with pytest.raises(PayloadTooLarge, match=r"The store has 2 of the kind lens \(max 2\)"):
        store.put("me", "c", {}, tensors(1))
    with pytest.raises(PayloadTooLarge, match="delete one"):
        store.put("me", "b", {}, tensors(1900))
    assert store.get("me", "b").tensors["a"].shape == (900,)


def test_the_least_used_of_those_who_have_the_most_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "ALL_SHARE", 3)
    store = TensorStore(tmp_path, "lens", 4000)
    for age, name in ((300, "old"), (200, "new")):
        store.put("rich", name, {}, tensors(900))
        path = store._folder("rich") / f"{name}.safetensors"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    store.put("poor", "one", {}, tensors(700))
    store.get("rich", "old")  # used now
    store.put("me", "mine", {}, tensors(900))
    assert list(store.of("rich")) == ["old"]
    assert list(store.of("poor")) == ["one"]


def test_a_disk_that_takes_nothing_is_told(tmp_path):
    (tmp_path / "lens").write_text("a file where the folder would be")
    with pytest.raises(InsufficientStorage, match="The lens cannot be stored"):
        TensorStore(tmp_path, "lens", 4000).put("me", "a", {}, tensors(1))


@pytest.mark.parametrize("damage", [b"", b"\0", b"\xff" * 400, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_told_passed_over_and_can_be_forgotten(tmp_path, damage):
    store = TensorStore(tmp_path, "lens", 1000)
    for name in ("whole", "damaged"):
        store.put("me", name, {}, {"a": numpy.ones(3, numpy.float32)})
    (path,) = tmp_path.rglob("damaged.safetensors")
    path.write_bytes(damage)
    assert list(store.of("me")) == ["whole"]
    with pytest.raises(NotFound, match="The lens 'damaged' in the store is damaged"):
        store.get("me", "damaged")
    store.delete("me", "damaged")
    with pytest.raises(NotFound, match="there are: whole"):
        store.delete("me", "damaged")


def test_what_a_crash_left_behind_goes(tmp_path):
    store = TensorStore(tmp_path, "lens", 1000)
    store.put("me", "one", {}, {"a": numpy.ones(3, numpy.float32)})
    (path,) = tmp_path.rglob("one.safetensors")
    old, new = path.with_name(".old"), path.with_name(".new")
    for part in (old, new):
        part.write_bytes(b"1")
    os.utime(old, (0, 0))
    store.put("me", "two", {}, {"a": numpy.ones(3, numpy.float32)})
    assert new.exists()
    assert not old.exists()


def test_names_and_owners_are_no_paths(tmp_path):
    store = TensorStore(tmp_path, "lens", 4000)
    store.put("../../x", "a", {}, tensors(1))
    assert all(path.is_relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    with pytest.raises(NotFound):
        store.get("me", "../a")

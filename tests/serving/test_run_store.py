"""The store of runs: bounded, each owner's own, whole files or none."""

from __future__ import annotations

import io
import json
import os
import zipfile
from contextlib import suppress

import numpy
import pytest

from transformers_api.engine.base import DryParams, SamplingParams
from transformers_api.errors import InsufficientStorage, InvalidRequest, NotFound, PayloadTooLarge
from transformers_api.inspection.activations import RecordedRows
from transformers_api.serving.inspect import run_file, run_params
from transformers_api.serving.inspect.run_compare import compare
from transformers_api.serving.inspect.run_file import Damaged, Run, StoredPart, joined
from transformers_api.serving.inspect.run_store import RunStore, new_id

NOW = 1_700_000_000
BITS = numpy.array([[0x3F80, 0xC000, 1]] * 4, numpy.uint16)  # bfloat16 1, -2 and the smallest


def run(size=0, created=NOW, **fields):
    parts = {(0, "resid"): StoredPart(bits=BITS, dtype="bfloat16")}
    if size:
        rows = numpy.random.default_rng(0).random((1, size // 4), numpy.float32)
        parts[1, "attn"] = StoredPart(bits=rows, dtype="float32", factor=0.25)
    return Run(
        **{
            "id": new_id(),
            "created": created,
            "model": "tiny",
            "fingerprint": "f",
            "prompt_ids": [1, 2],
            "token_ids": [3, 4, 5],
            "prompt_tokens": ["a", "b"],
            "tokens": ["c", "d", "e"],
            "text": "cde",
            "finish_reason": "length",
            "params": {"seed": 3},
            "steps": [{"topk": [], "lens": []}],
            "parts": parts,
        }
        | fields
    )


class Clock:
    def __init__(self):
        self.now = float(NOW)

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    return RunStore(tmp_path / "runs", 400_000, most=4, clock=clock)


def ids_of(store, owner="me"):
    return [meta["id"] for meta, _ in store.of(owner)]


def test_a_run_comes_back_as_it_was_from_another_process_too(store, tmp_path, clock):
    kept = run(size=400, intervene={"edits": [1]}, spans=[{"role": "user"}])
    size = store.put("me", kept)
    again = RunStore(tmp_path / "runs", 400_000, clock=clock).get("me", kept.id)
    assert again.meta == kept.meta
    assert list(again.steps) == list(kept.steps)
    for place, part in kept.parts.items():
        assert numpy.array_equal(again.parts[place].bits, part.bits)
    assert again.numbers(0, "resid")[0].tolist() == [1.0, -2.0, 2.0**-133]
    assert again.numbers(1, "attn").dtype == numpy.float64
    assert store.of("me") == [({**kept.meta, "steps": list(kept.steps)}, size)]
    files = list((tmp_path / "runs").iterdir())
    assert [file.suffix for file in files] == [".npz"]
    assert files[0].parent.stat().st_mode & 0o077 == 0
    with pytest.raises(
        InvalidRequest, match=r"has no mlp of layer 0; it has resid of layer 0, attn"
    ):
        again.numbers(0, "mlp")


def test_runs_are_their_owners_alone(store):
    mine = run()
    store.put("me", mine)
    for act in (store.get, store.delete):
        with pytest.raises(NotFound, match=f"No run '{mine.id}'; you have none"):
            act("other", mine.id)
    assert ids_of(store, "other") == []
    store.delete("me", mine.id)
    with pytest.raises(NotFound):
        store.get("me", mine.id)


@pytest.mark.parametrize("name", ["../x", "", "run-1", "run-" + "0" * 16 + "/../x", "a" * 900])
def test_no_name_reaches_a_file(store, name):
    store.put("me", run())
    with pytest.raises(NotFound) as caught:
        store.get("me", name)
    assert len(str(caught.value)) < 200


def test_whoever_has_most_loses_what_was_used_least(store, clock):
    first, second, small = run(size=90_000), run(size=90_000), run()
    for number, (owner, own) in enumerate([("me", first), ("me", second), ("other", small)]):
        clock.now += number
        store.put(owner, own)
    clock.now += 9
    store.get("me", first.id)
    for _ in range(2):
        clock.now += 1
        store.put("me", run(size=90_000))
    assert first.id in ids_of(store)
    assert second.id not in ids_of(store)
    assert len(ids_of(store)) == 3  # of four runs in all
    assert ids_of(store, "other") == [small.id]
    clock.now += 1
    store.put("me", run(size=99_000))
    store.put("me", run(size=99_000))
    assert sum(size for _, size in store.of("me")) <= 400_000
    assert ids_of(store, "other") == [small.id]


def test_one_run_may_take_a_quarter_and_none_where_none_are_kept(store, tmp_path):
    with pytest.raises(PayloadTooLarge, match=r"up to 0\.1 MB would be too large \(max 0\.1 MB\)"):
        store.put("me", run(size=110_000))
    with pytest.raises(InvalidRequest, match=r"not kept on this server \(RUNS_MAX_MB is 0\)"):
        RunStore(tmp_path, 0).put("me", run())


def test_what_is_a_day_old_is_gone(store, clock, tmp_path):
    old, new = run(), run(created=NOW + 3600)
    store.put("me", old)
    clock.now += 3600
    store.put("me", new)
    clock.now = NOW + 24 * 3600 + 1
    assert ids_of(store) == [new.id]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def pickled(_content):
    file = io.BytesIO()
    numpy.savez(file, meta=numpy.array([{"v": 1}], object))
    return file.getvalue()


def remade(content, change):
    """The file with another document."""
    arrays = dict(numpy.load(io.BytesIO(content)))
    meta = json.loads(arrays["meta"].tobytes())
    change(meta)
    file = io.BytesIO()
    numpy.savez(file, **arrays | {"meta": numpy.frombuffer(json.dumps(meta).encode(), "u1")})
    return file.getvalue()


def bomb(_content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("meta.npy", bytes(2_000_000))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content.replace(b"PK", b"XX"),
        lambda content: content[:180] + bytes([content[180] ^ 255]) + content[181:],
        pickled,
        bomb,
        lambda content: content.replace(b"\x08\0\0\0!\0", b"\x0c\0\0\0!\0"),
        lambda content: remade(content, lambda meta: meta.update(token_ids=5)),
        lambda content: remade(content, lambda meta: meta.update(tokens=[])),
        lambda content: remade(content, lambda meta: meta.update(prompt_ids=[None, 1])),
        lambda content: remade(content, lambda meta: meta.update(params={"nobody": 1})),
        lambda content: remade(content, lambda meta: meta.update(activations=[{}])),
        lambda content: remade(content, lambda meta: meta.pop("text")),
    ],
)
def test_a_damaged_file_is_passed_over_and_the_others_are_there(store, tmp_path, damage):
    whole, broken = run(), run()
    store.put("me", whole)
    store.put("me", broken)
    (file,) = (tmp_path / "runs").glob(f"*{broken.id}.npz")
    file.write_bytes(damage(file.read_bytes()))
    (tmp_path / "runs" / "notes.txt").write_text("not ours")
    assert whole.id in ids_of(store)
    with pytest.raises(NotFound, match="is damaged"):
        store.get("me", broken.id)
    assert store.get("me", whole.id).text == "cde"


def test_files_that_are_damaged_anywhere_harm_no_other(store, tmp_path):
    whole, broken = run(), run()
    store.put("me", whole)
    store.put("me", broken)
    (file,) = (tmp_path / "runs").glob(f"*{broken.id}.npz")
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        assert whole.id in ids_of(store)
        with suppress(NotFound):
            assert store.get("me", broken.id).id == broken.id


def test_a_disk_that_takes_nothing_is_told(store, tmp_path):
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(InsufficientStorage, match="The run cannot be stored"):
        store.put("me", run())


def test_what_a_crash_left_behind_is_not_a_run(store, tmp_path, clock):
    store.put("me", run())
    left = tmp_path / "runs" / ".half-written"
    left.write_bytes(b"x")
    os.utime(left, (NOW, NOW))
    assert len(ids_of(store)) == 1
    clock.now += 25 * 3600
    ids_of(store)
    assert not left.exists()


def test_meta_of_another_version_is_no_run():
    file = io.BytesIO()
    numpy.savez(file, meta=numpy.frombuffer(b'{"v": 99}', numpy.uint8))
    with pytest.raises(Damaged, match="another version"):
        run_file.read(io.BytesIO(file.getvalue()), 1 << 20)


def test_rows_are_joined_and_what_is_read_again_counts_last():
    def piece(start, *values):
        bits = numpy.array(values, numpy.float32)[:, None]
        return RecordedRows(part="mlp", layer=2, start=start, bits=bits, dtype="float32")

    parts = joined([piece(0, 1, 2, 3), piece(3, 4), piece(2, 7, 8, 9)])
    assert parts[2, "mlp"].bits[:, 0].tolist() == [1, 2, 7, 8, 9]


def test_sampling_parameters_come_back_as_they_were():
    dry = DryParams(multiplier=0.8, breakers={3: frozenset({(), (4, 5)})})
    params = SamplingParams(
        max_tokens=7,
        temperature=0.3,
        seed=2**63 - 1,
        dry=dry,
        logit_bias={5: -1.5},
        allowed_token_ids=frozenset({1, 9}),
        stop_token_ids=frozenset({2}),
    )
    document = run_params.to_json(params)
    assert run_params.from_json(document) == params
    assert "top_p" not in document


def noted(*pairs):
    topk = [{"token_id": token, "logprob": float(numpy.log(share))} for token, share in pairs]
    return {"topk": topk, "logprob": -0.5, "entropy": 1.0}


def test_two_runs_are_aligned_where_their_answers_begin():
    rows = numpy.arange(12, dtype=numpy.float32).reshape(4, 3) - 5
    shifted = numpy.concatenate([numpy.ones((1, 3), numpy.float32), rows])
    lens = [{"layer": 0, "token_id": 8}, {"layer": 4, "token_id": 3}, {"layer": 2, "token_id": 3}]
    one = run(
        steps=[{**noted((3, 0.5), (4, 0.25)), "lens": lens}],
        parts={(0, "resid"): StoredPart(bits=rows, dtype="float32")},
    )
    other = run(
        prompt_ids=[9, 1, 2],
        token_ids=[3, 7],
        tokens=["c", "x"],
        steps=[noted((3, 0.25), (4, 0.5))],
        parts={(0, "resid"): StoredPart(bits=shifted, dtype="float32")},
    )
    answer = compare(one, other, 100)
    assert (answer["same_prompt"], answer["identical"], answer["first_difference"]) == (
        *(False, False),
        1,
    )
    first, second, third = answer["tokens"]
    assert first["kl_at_least"] == pytest.approx(0.25 * numpy.log(2), abs=1e-6)
    assert (first["a"]["settled_layer"], first["b"]["settled_layer"]) == (2, None)
    assert (second["a"]["token"], second["b"]["token"], second["kl_at_least"]) == ("d", "x", None)
    assert third["b"] is None
    (part,) = answer["activations"]
    assert (part["first"], part["cosine"]) == (-2, [1.0, 1.0, 1.0, 1.0])
    assert compare(one, other, 3)["activations"][0]["cosine"] is None
    assert compare(one, one, 100)["tokens"][0]["kl_at_least"] == 0

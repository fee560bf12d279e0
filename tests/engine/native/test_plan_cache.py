"""What a load found out, on the disk: another process does the same with it, or finds out anew."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.models import prompts_of, tiny_model
from tests.engine.reading import GREEDY, ask, read
from tests.inspection.test_trace import everything
from tests.repeats import slow
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native import plan_cache
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.inspection import attachment as attachment_module
from transformers_api.inspection.attachment import Attachment
from transformers_api.inspection.examination_file import ExaminationStore

FAMILIES = [
    ("llama", {"dtype": "bfloat16"}),
    ("qwen3", {"quantization": "int8"}),
    ("gpt2", {}),
    ("gemma3", {}),
    *slow(
        ("llama", {}),
        ("mistral-window-8", {}),
        ("gemma2", {}),
        ("gpt-neox", {}),
        ("opt", {}),
    ),
]
ASKED = [ask(prompt, max_tokens=8, **GREEDY, logprobs=2) for prompt in prompts_of(3)]
SCORED = ask(prompts_of(3)[1], max_tokens=2, **GREEDY, prompt_logprobs=1)


@pytest.fixture
def load(engine_thread, native_cache, tmp_path, monkeypatch):
    """load(folder, **options): a running engine.

    ``load.watched``, ``load.examinations``: how many models were watched, were examined.
    """
    honest, examine = NativeRunner.learn, attachment_module.examine

    def learn(self, *waits):
        load.watched += 1
        honest(self, *waits)

    def examined(*args, **sizes):
        load.examinations += 1
        return examine(*args, **sizes)

    def load(folder, **options):
        options = {
            "num_slots": 3,
            "native": native_cache,
            "plans": tmp_path / "plans",
            "stamp": str(folder),
        } | options
        store = ExaminationStore(tmp_path / "examined", lambda: load.program)
        attachment = Attachment(slice_tokens=8, store=store)
        engine = engine_thread.call(
            lambda: load_engine(folder, LoadOptions(**options), engine_thread, attachment.wrap)
        ).result()
        load.examined = attachment.examined
        return engine

    load.watched, load.examinations, load.program = 0, 0, "this"
    monkeypatch.setattr(NativeRunner, "learn", learn)
    monkeypatch.setattr(attachment_module, "examine", examined)
    return load


def saved(name, folder):
    tiny_model(name).save_pretrained(folder)
    return folder


def files(tmp_path):
    return sorted((tmp_path / "plans").glob("*"))


def everything_said(load, folder, **options):
    """Of one residence: tokens, logits and traces of prompts in company, and scores of a prompt."""
    engine = load(folder, **options)
    plan = everything(load.examined.anatomy)
    together = read(engine.submit(ASKED, observe={"trace": plan}))
    alone = read(engine.submit([SCORED]))
    engine.close()
    said = [o for outputs in (together, alone) for index in sorted(outputs) for o in outputs[index]]
    assert all(output.error is None for output in said)
    return [repr((o.token_id, o.score, o.prompt_scores, dict(o.extras))) for o in said]


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_a_model_that_is_known_says_and_shows_the_same_and_is_not_watched(
    load, tmp_path, name, options
):
    folder = saved(name, tmp_path / "model")
    wanted = everything_said(load, folder, **options)
    assert load.watched == load.examinations == 1
    assert any("attention" in said for said in wanted)
    first = load.examined
    assert everything_said(load, folder, **options) == wanted
    assert load.watched == load.examinations == 1
    assert (load.examined.anatomy, load.examined.parts) == (first.anatomy, first.parts)
    assert everything_said(load, folder, plans=None, **options) == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_model_has_the_same_plan_wherever_its_tensors_lie(load, tmp_path, name):
    folder, contents = saved(name, tmp_path / "model"), []
    for number in range(4):
        plans = tmp_path / f"plans {number}"
        load(folder, plans=plans).close()
        (file,) = plans.glob("*")
        contents.append(file.read_bytes())
        others = [bytearray(7 * 64 * n) for n in range(1, 40 * number)]  # the heap is another one
        del others[::2]
    assert contents == [contents[0]] * 4


def test_a_damaged_examination_or_one_of_other_sources_is_made_anew(load, tmp_path):
    folder = saved("llama", tmp_path / "model")
    wanted = everything_said(load, folder)
    (file,) = (tmp_path / "examined").glob("*")
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"lens": true', b'"lens": null'))
    assert file.read_bytes() != content
    assert everything_said(load, folder) == wanted
    assert load.examinations == 2
    assert file.read_bytes() == content
    load.program = "another"
    assert everything_said(load, folder) == wanted
    assert load.examinations == 3


def test_a_model_that_says_something_else_is_examined_again(load, tmp_path):
    folder = saved("llama", tmp_path / "model")
    load(folder).close()
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v * 1.5 for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    load(folder).close()  # of the same stamp
    assert load.examinations == 2


ELSEWHERE = """
import json, os, sys
from pathlib import Path
from tests.engine.native.test_plan_cache import ASKED
from tests.engine.reading import read
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.thread import EngineThread

folder, native, plans = map(Path, sys.argv[1:])
if any(plans.glob("*")):
    NativeRunner.learn = None
thread = EngineThread(num_threads=1)
options = LoadOptions(num_slots=3, native=native, plans=plans, stamp="the same")
engine = thread.call(lambda: load_engine(folder, options, thread)).result()
said = read(engine.submit(ASKED))
outputs = [repr((o.token_id, o.score)) for index in sorted(said) for o in said[index]]
print(json.dumps(outputs), flush=True)
os._exit(0)
"""


@pytest.mark.slow  # every server that a test starts with the default model does it, too
def test_what_a_process_found_out_is_enough_for_another(native_cache, tmp_path):
    folder = saved("gemma3", tmp_path / "model")
    command = [sys.executable, "-c", ELSEWHERE, folder, native_cache, tmp_path / "plans"]
    said = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout))
        assert len(files(tmp_path)) == 1
    assert len(said[0]) > 20
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "other",
    [
        {"stamp": 2},
        {"quantization": "int8"},
        *slow({"num_slots": 2}, {"max_context_tokens": 64}),
        {"dtype": "float32"},  # which this small one is anyway
    ],
)
def test_other_files_or_options_have_other_plans(load, tmp_path, other):
    folder = saved("llama", tmp_path / "model")
    load(folder).close()
    load(folder, **other).close()
    assert load.watched == 2
    assert len(files(tmp_path)) == 2


def test_another_program_finds_out_for_itself(load, tmp_path, monkeypatch):
    folder = saved("llama", tmp_path / "model")
    load(folder).close()
    monkeypatch.setattr(plan_cache, "program", lambda: "the next version")
    load(folder).close()
    assert load.watched == 2


@pytest.mark.parametrize("options", [{"stamp": None}, {"trust_remote_code": True}])
def test_nothing_is_kept_of_a_model_that_may_be_another_one(load, tmp_path, options):
    folder = saved("llama", tmp_path / "model")
    load(folder, **options).close()
    assert not files(tmp_path)


@pytest.mark.parametrize("at", [0, 3000])
def test_a_damaged_file_is_not_read_and_is_written_again(load, tmp_path, caplog, at):
    folder = saved("llama", tmp_path / "model")
    wanted = everything_said(load, folder)
    (file,) = files(tmp_path)
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 1
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert everything_said(load, folder) == wanted
    assert load.watched == 2
    assert "damaged" in caplog.text
    assert everything_said(load, folder) == wanted
    assert load.watched == 2


@pytest.mark.parametrize("size", [0, 5000])
def test_a_file_that_was_cut_off_is_not_read(load, tmp_path, size):
    folder = saved("llama", tmp_path / "model")
    load(folder).close()
    (file,) = files(tmp_path)
    os.truncate(file, size)
    load(folder).close()
    assert load.watched == 2


def test_weights_that_changed_unnoticed_are_watched_anew(load, tmp_path, caplog):
    folder = saved("llama", tmp_path / "model")
    before = everything_said(load, folder)
    path = folder / "model.safetensors"
    weights = {name: weight * 1.5 for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        after = everything_said(load, folder)
    assert "not what was known" in caplog.text
    assert load.watched == 2
    assert after != before
    assert after == everything_said(load, folder, plans=None)
    assert everything_said(load, folder) == after


def test_a_model_of_another_build_is_watched_anew(load, tmp_path):
    saved("llama", tmp_path / "model")
    load(tmp_path / "model", stamp=1).close()
    saved("gpt2", tmp_path / "other")
    wanted = everything_said(load, tmp_path / "other", plans=None)
    assert everything_said(load, tmp_path / "other", stamp=1) == wanted


def test_a_folder_that_cannot_be_written_costs_time_only(load, tmp_path):
    folder = saved("llama", tmp_path / "model")
    (tmp_path / "plans").write_text("a file")
    assert everything_said(load, folder) == everything_said(load, folder)
    assert load.watched == 2


def test_constants_that_are_too_large_are_not_kept(load, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "LARGEST_CONSTANTS", 0)
    load(saved("gemma3", tmp_path / "model")).close()
    assert not files(tmp_path)


def test_a_plan_with_what_has_no_name_is_not_kept(load, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "packed_weights", lambda model: [])
    folder = saved("llama", tmp_path / "model")
    assert everything_said(load, folder) == everything_said(load, folder)
    assert load.watched == 2
    assert not files(tmp_path)


def test_the_files_that_were_used_last_are_kept(load, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "MOST_FILES", 2)
    folder = saved("llama", tmp_path / "model")
    for number, stamp in enumerate(["first", "second", "first", "third"]):
        load(folder, stamp=stamp).close()
        for file in files(tmp_path):
            os.utime(file, ns=(file.stat().st_mtime_ns - 10**9, file.stat().st_mtime_ns - 10**9))
        assert len(files(tmp_path)) == min(number + 1, 2)
    load(folder, stamp="first").close()
    assert load.watched == 3

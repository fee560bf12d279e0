"""The compiler: used once, not needed, never in the way."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from transformers_api.engine.native import build as building
from transformers_api.engine.native.build import NativeUnavailable, build
from transformers_api.engine.native.cores import usable_cores
from transformers_api.engine.native.library import Library, load_library
from transformers_api.engine.native.linear import PackedWeight, WeightMemory


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_earlier_result_is_used_again(library_file):
    made = library_file.stat().st_mtime_ns
    assert build(library_file.parent) == library_file
    assert library_file.stat().st_mtime_ns == made
    assert list(library_file.parent.iterdir()) == [library_file]


def test_a_compiler_that_fails_is_named_and_leaves_nothing_behind(tmp_path, library_file):
    bad = script(
        tmp_path / "bad", 'case "$1" in --version) echo 1;; *) echo "error: no" >&2; exit 1;; esac'
    )
    with pytest.raises(NativeUnavailable, match="bad failed: error: no"):
        build(tmp_path / "cache", compiler=bad)
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_compiler_there_is_a_line_in_the_log_and_no_library(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    monkeypatch.setattr(building, "check_processor", lambda: None)
    assert load_library(tmp_path, 2) is None
    assert "there is no compiler (g++, clang++)" in caplog.text


def test_without_the_instructions_nothing_is_compiled(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(building, "_cpu_flags", lambda: {"avx512f"})
    monkeypatch.setattr(building.platform, "system", lambda: "Linux")
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    assert load_library(tmp_path / "cache", 2) is None
    assert "the processor has no avx512bw" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_another_machine_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(building.platform, "machine", lambda: "aarch64")
    assert load_library(tmp_path, 2) is None
    assert "Linux on x86-64" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path, library_file, caplog):
    (tmp_path / "file").write_text("")
    assert load_library(tmp_path / "file" / "cache", 2) is None
    assert "cannot write to" in caplog.text


def test_a_damaged_library_is_no_reason_to_fail(tmp_path, library_file, caplog):
    (tmp_path / library_file.name).write_bytes(b"not a library")
    assert load_library(tmp_path, 2) is None
    assert "No native kernels" in caplog.text


def build_and_use(cache: str, start, results) -> None:
    start.wait()
    library = Library(build(Path(cache)), 1)
    packed = PackedWeight(library, [torch.ones(3, 5)], "float32", WeightMemory())
    results.put(packed.multiply(torch.ones(1, 5)).tolist())


def test_two_processes_may_build_at_once(tmp_path, library_file):
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    both = [
        spawn.Process(target=build_and_use, args=(str(tmp_path), start, results)) for _ in range(2)
    ]
    for process in both:
        process.start()
    assert [results.get(timeout=50) for _ in both] == [[[5.0, 5.0, 5.0]]] * 2
    for process in both:
        process.join()
    assert [path.name for path in tmp_path.iterdir()] == [library_file.name]


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param({}, 4, id="no limit known"),
        pytest.param({"sys/fs/cgroup/cpu.max": "max 100000"}, 4, id="no quota"),
        pytest.param({"sys/fs/cgroup/cpu.max": "250000 100000"}, 2, id="a quota of 2.5"),
        pytest.param({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1, id="less than one"),
        pytest.param(
            {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "300000 100000"},
            3,
            id="a quota of its own group",
        ),
        pytest.param(
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
            id="version 1",
        ),
        pytest.param({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, 4, id="version 1, no quota"),
        pytest.param(
            {
                f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}"
                for n in range(4)
            },
            2,
            id="two threads per core",
        ),
    ],
)
def test_threads_are_as_many_as_can_really_run(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert usable_cores(tree(tmp_path, files)) == cores

"""The compiler: used once, not needed, never in the way."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest

from tests.servers import ROOT
from transformers_api.check import report
from transformers_api.config.settings import Settings
from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.kernels import build as building
from transformers_api.kernels import variants
from transformers_api.kernels.build import build, find
from transformers_api.kernels.provider import KernelProvider
from transformers_api.kernels.variants import VARIANTS, NativeUnavailable, of_machine


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def compiler(path: Path, *, fails: bool = False) -> str:
    """One that is quick: what it makes is the file ``made`` beside it, or an error."""
    called = f"echo called >>{path.parent}/calls"
    copy = f'for to; do :; done; cp {path.parent}/made "$to"'
    return script(path, f"{called}; " + ("echo 'error: no' >&2; exit 1" if fails else copy))


@pytest.fixture
def quick(tmp_path, library_file, monkeypatch):
    """A compiler on the path, whose calls are lines of the file ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(library_file, folder / "made")
    compiler(folder / "g++")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_an_earlier_result_is_used_again_also_without_a_compiler(tmp_path, quick, monkeypatch):
    made = build(tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    assert build(tmp_path / "cache") == made == find(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [made]
    assert (quick / "calls").read_text() == "called\n"


def test_the_result_is_for_every_user_whatever_the_umask(tmp_path, quick):
    before = os.umask(0o077)
    try:
        made = build(tmp_path / "cache")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o755


def test_another_source_or_another_libc_is_another_library(tmp_path, quick, monkeypatch):
    build(tmp_path / "cache")
    monkeypatch.setattr(building.platform, "libc_ver", lambda: ("glibc", "2.0"))
    assert find(tmp_path / "cache") is None


def test_a_compiler_that_fails_is_named_and_leaves_nothing_behind(tmp_path, library_file):
    bad = compiler(tmp_path / "bad", fails=True)
    with pytest.raises(NativeUnavailable, match="bad failed: error: no"):
        build(tmp_path / "cache", compiler=[bad])
    assert not list((tmp_path / "cache").iterdir())


def test_what_an_interrupted_compiler_left_is_cleared_away(tmp_path, quick):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels-0123.part").touch()
    made = build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [made]


def test_without_a_compiler_there_is_a_line_in_the_log_and_no_library(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    monkeypatch.setattr(variants, "cpu_flags", lambda: set(variants.of_machine()[-1].features))
    assert KernelProvider(tmp_path, 2).library() is None
    assert "there is no compiler (g++, clang++, ziglang)" in caplog.text


def test_without_the_instructions_nothing_is_compiled(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(variants, "cpu_flags", lambda: {"avx512f", "avx2"})
    monkeypatch.setattr(building.platform, "system", lambda: "Linux")
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    assert KernelProvider(tmp_path / "cache", 2).library() is None
    assert "the processor has no fma, f16c" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_another_machine_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(building.platform, "machine", lambda: "riscv64")
    assert KernelProvider(tmp_path, 2).library() is None
    assert "Linux on x86-64" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path, library_file, caplog):
    (tmp_path / "file").write_text("")
    assert KernelProvider(tmp_path / "file" / "cache", 2).library(wait=True) is None
    assert "cannot write to" in caplog.text


def test_a_whole_library_that_cannot_be_opened_is_no_reason_to_fail(tmp_path, quick, caplog):
    (tmp_path / building.content_name(b"not a library")).write_bytes(b"not a library")
    assert KernelProvider(tmp_path, 2).library() is None
    assert "No native kernels" in caplog.text


ASK = """
import sys
from pathlib import Path
from transformers_api.kernels.build import build
print("asking", flush=True)
print(build(Path(sys.argv[1])), flush=True)
"""


def asking(cache: Path) -> subprocess.Popen[str]:
    """Another process that wants the library."""
    return subprocess.Popen(
        [sys.executable, "-c", ASK, str(cache)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_of_two_processes_at_once_one_compiles(tmp_path, quick):
    go, cache = tmp_path / "go", tmp_path / "cache"
    os.mkfifo(go)
    script(
        quick / "g++",
        f"echo called >>{quick}/calls; read -r line <{go}; for to; do :; done; "
        f'cp {quick}/made "$to"',
    )
    with asking(cache) as first, go.open("w") as compiler_waits, asking(cache) as second:
        for process in (first, second):
            assert process.stdout.readline() == "asking\n"
        compiler_waits.write("on\n")
        compiler_waits.close()
        found = [process.stdout.read().strip() for process in (first, second)]
    assert found == [str(path) for path in cache.iterdir()] * 2
    assert (quick / "calls").read_text() == "called\n"


def test_nobody_waits_for_the_compiler_and_who_asked_is_told(tmp_path, quick):
    go = tmp_path / "go"
    os.mkfifo(go)
    script(quick / "g++", f'read -r line <{go}; for to; do :; done; cp {quick}/made "$to"')
    compiled = threading.Event()
    provider = KernelProvider(tmp_path / "cache", 2)
    assert provider.library() is None
    assert provider.library() is None
    assert provider.when_compiled(compiled.set)
    assert not compiled.is_set()
    go.write_text("on\n")
    assert compiled.wait(20)
    assert provider.library() is not None
    later = threading.Event()
    assert provider.when_compiled(later.set)
    assert later.is_set()


def test_a_compiler_that_fails_in_the_background_is_told_once_and_not_tried_again(
    tmp_path, quick, caplog
):
    compiler(quick / "g++", fails=True)
    provider = KernelProvider(tmp_path / "cache", 2)
    assert provider.library() is None
    for thread in threading.enumerate():
        if thread.name == "compiler":
            thread.join()
    assert provider.library() is None
    assert not provider.when_compiled(pytest.fail)
    assert caplog.text.count("No native kernels, so inference is slower") == 1
    assert (quick / "calls").read_text() == "called\n"


def test_where_the_kernels_are_nothing_is_compiled(library_file, quick):
    provider = KernelProvider(library_file.parent, 2)
    assert provider.library() is not None
    assert not provider.when_compiled(pytest.fail)
    assert not (quick / "calls").exists()


def refused_by_its_abi(path, compile_source):
    path.unlink()
    other = compile_source('extern "C" int abi_version() { return -1; }')
    return shutil.copy(other, path.parent / other.name)


def a_link_to_a_folder_of_others(path, compile_source):
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    path.symlink_to(path.rename(elsewhere / path.name))


def a_link_to_nothing(path, compile_source):
    path.unlink()
    path.symlink_to("nowhere")


def damaged(change):
    """The file with other bytes: ``change`` makes them of its own."""

    def spoil(path, compile_source):
        path.write_bytes(change(path.read_bytes()))

    return spoil


def inverted(data, start, count):
    return (
        data[:start]
        + bytes(byte ^ 255 for byte in data[start : start + count])
        + data[start + count :]
    )


def writable_by_a_group(path, compile_source):
    path.chmod(0o775)


def writable_by_all(path, compile_source):
    path.chmod(0o757)


def of_another_user(path, compile_source):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 4711, 4711)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(refused_by_its_abi, "its ABI has version -1", id="another ABI"),
        pytest.param(writable_by_a_group, "may be written by others (mode 775)", id="group"),
        pytest.param(writable_by_all, "may be written by others (mode 757)", id="all"),
        pytest.param(of_another_user, "belongs to the user 4711", id="owner"),
        pytest.param(a_link_to_a_folder_of_others, "is not a file of this folder", id="link"),
        pytest.param(a_link_to_nothing, "is not a file of this folder", id="dangling link"),
        pytest.param(damaged(lambda data: b""), "another digest", id="empty"),
        pytest.param(damaged(lambda data: data[: len(data) // 2]), "another digest", id="half"),
        pytest.param(damaged(lambda data: data[:-1]), "another digest", id="a byte less"),
        pytest.param(damaged(lambda data: data + b"\0"), "another digest", id="a byte more"),
        pytest.param(
            damaged(lambda data: inverted(data, 100_000, 1)), "another digest", id="bit flips"
        ),
        pytest.param(
            damaged(lambda data: data[:60_000] + bytes(60_000) + data[120_000:]),
            "another digest",
            id="zeros",
        ),
        pytest.param(
            damaged(lambda data: Path(sys.executable).read_bytes()),
            "another digest",
            id="another program",
        ),
    ],
)
def test_a_library_that_must_not_be_used_is_not_opened_and_another_is_compiled(
    tmp_path, quick, compile_source, caplog, spoil, reason
):
    cache = tmp_path / "cache"
    made = build(cache)
    path = spoil(made, compile_source) or made
    spoiled = path.lstat().st_ino
    provider = KernelProvider(cache, 2)
    assert provider.library(wait=True) is not None
    assert f"The compiled library {path} is not used: " in caplog.text
    assert reason in caplog.text
    assert list(cache.iterdir()) == [made]
    assert made.lstat().st_ino != spoiled
    assert provider.outcomes == {"succeeded": 1, "failed": 0}


def test_a_library_that_must_not_be_used_is_compiled_anew_by_the_command_too(tmp_path, quick):
    path = build(tmp_path / "cache")
    path.chmod(0o777)
    build(tmp_path / "cache")
    assert path.stat().st_mode & 0o777 == 0o755
    assert (quick / "calls").read_text() == "called\n" * 2


def test_where_another_cannot_be_compiled_there_are_no_kernels_and_a_reason(tmp_path, quick):
    build(tmp_path / "cache").chmod(0o777)
    compiler(quick / "g++", fails=True)
    provider = KernelProvider(tmp_path / "cache", 2)
    assert provider.library(wait=True) is None
    assert "error: no" in provider.why_not
    assert provider.outcomes == {"succeeded": 0, "failed": 1}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(writable_by_a_group, "may be written by others (mode 775)", id="group"),
        pytest.param(writable_by_all, "may be written by others (mode 757)", id="all"),
        pytest.param(of_another_user, "belongs to the user 4711", id="owner"),
    ],
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_in_a_folder_of_others_nothing_is_opened_or_compiled(
    tmp_path, quick, monkeypatch, spoil, reason, is_compiled
):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    if is_compiled:
        build(cache)
        (quick / "calls").unlink()
    spoil(cache, None)
    provider = KernelProvider(cache, 2)
    assert provider.library(wait=True) is None
    assert reason in provider.why_not
    with pytest.raises(NativeUnavailable, match=re.escape(reason)):
        build(cache)
    assert not (quick / "calls").exists()
    monkeypatch.setenv("NATIVE_CACHE", str(cache))
    output = io.StringIO()
    report(output)
    assert reason in output.getvalue()


def test_of_several_libraries_the_whole_one_is_used(tmp_path, quick):
    made = build(tmp_path / "cache")
    for number in range(3):
        copy = made.with_name(f"{made.stem.rpartition('-')[0]}-{number:032x}.so")
        shutil.copy(made, copy)
        copy.write_bytes(copy.read_bytes()[:-number])
    assert find(tmp_path / "cache") == made == build(tmp_path / "cache")
    assert (quick / "calls").read_text() == "called\n"


def test_a_library_is_on_the_disk_before_it_has_its_name(tmp_path, quick, monkeypatch):
    synced = []
    monkeypatch.setattr(building.os, "fsync", lambda handle: synced.append(os.fstat(handle)))
    made = build(tmp_path / "cache")
    file, folder = synced
    assert (file.st_ino, file.st_size) == (made.stat().st_ino, made.stat().st_size)
    assert folder.st_ino == made.parent.stat().st_ino


def test_a_cache_is_not_for_a_group_to_write_whatever_the_umask(tmp_path, quick):
    before = os.umask(0)
    try:
        build(tmp_path / "cache")
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o755


def test_any_source_that_changes_makes_another_library(tmp_path, monkeypatch):
    sources = tmp_path / "src"
    shutil.copytree(building.SOURCES, sources)
    monkeypatch.setattr(building, "SOURCES", sources)
    (tmp_path / "cache").mkdir()
    variant = of_machine()[-1]  # whether or not this processor has it
    (tmp_path / "cache" / building.content_name(b"", variant)).touch()
    assert find(tmp_path / "cache", variant)
    for path in sources.iterdir():
        text = path.read_text()
        path.write_text(f"{text}// changed\n")
        assert find(tmp_path / "cache", variant) is None
        path.write_text(text)
    assert find(tmp_path / "cache", variant)


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


def test_each_instruction_set_can_be_forced_by_its_name():
    (option,) = (field for field in fields(Settings) if field.name == "native_isa")
    for name in ("auto", "none", *(variant.name for variant in VARIANTS)):
        assert option.metadata["parse"](name) == name
    assert not Settings.from_env({"NATIVE_ISA": "none"}).native_kernels


def test_the_best_that_a_processor_has_is_taken_and_one_that_it_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(variants, "cpu_flags", lambda: {"avx2", "fma", "f16c", "avx_vnni"})
    assert variants.choose().name == "avx2_vnni"
    assert variants.choose("avx2").name == "avx2"
    with pytest.raises(NativeUnavailable, match="no avx512f"):
        variants.choose("avx512")

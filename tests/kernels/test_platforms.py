"""Other systems than Linux: names, instructions, and libraries that are cross-compiled."""

from __future__ import annotations

import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.servers import ROOT
from transformers_api.kernels import build as building
from transformers_api.kernels import platforms, variants
from transformers_api.kernels.abi import SIGNATURES
from transformers_api.kernels.build import build_for_package, find_compiler, wheel_platform
from transformers_api.kernels.platforms import BY_NUMPY, PLATFORMS, Platform, platform_named
from transformers_api.kernels.variants import NativeUnavailable, cpu_flags, of_machine

ARM_LINUX = platform_named("Linux", "aarch64")
INTEL_MAC, ARM_MAC = platform_named("macos", "x86_64"), platform_named("macos", "arm64")
INTEL_WINDOWS = platform_named("windows", "x86_64")
ARM_WINDOWS = platform_named("windows", "aarch64")
FOREIGN = [each for each in PLATFORMS if each.system != "linux"]
CHEAPEST = {"x86_64": "avx2", "aarch64": "neon"}
EXPORTED = {"abi_version", "abi_layout", *SIGNATURES}


def named(platform: Platform) -> str:
    return f"{platform.system} {platform.machine}"


@pytest.fixture
def on(monkeypatch):
    """Let this process believe that it runs there."""

    def on(system: str, machine: str) -> None:
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("platform.machine", lambda: machine)

    return on


@pytest.fixture
def ziglang(tmp_path, monkeypatch) -> Path:
    """The folder that stands in for the package: what it compiles are its own arguments."""
    folder = tmp_path / "ziglang"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text(
        "import pathlib, sys\n"
        "made = pathlib.Path(sys.argv[sys.argv.index('-o') + 1])\n"
        "made.write_text(' '.join(sys.argv[1:]))\n"
        "if '-windows-' in ' '.join(sys.argv): made.with_name('kernels.lib').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("system", "machine", "expected", "suffix", "tag"),
    [
        ("Linux", "x86_64", "linux x86_64", ".so", "manylinux_2_28_x86_64"),
        ("Linux", "aarch64", "linux aarch64", ".so", "manylinux_2_28_aarch64"),
        ("Darwin", "arm64", "macos aarch64", ".dylib", "macosx_12_0_arm64"),
        ("Darwin", "x86_64", "macos x86_64", ".dylib", "macosx_12_0_x86_64"),
        ("Windows", "AMD64", "windows x86_64", ".dll", "win_amd64"),
        ("Windows", "ARM64", "windows aarch64", ".dll", "win_arm64"),
    ],
)
def test_a_system_goes_by_the_names_that_python_has_for_it(
    on, system, machine, expected, suffix, tag
):
    on(system, machine)
    platform = platform_named()
    assert named(platform) == expected
    assert (platform.suffix, wheel_platform(["ziglang"], platform)) == (suffix, tag)
    assert building.content_name(b"", of_machine()[-1]).endswith(suffix)


def test_what_a_compiler_of_linux_makes_is_for_its_own_c_library():
    assert wheel_platform(["g++"], ARM_LINUX) == "linux_aarch64"


@pytest.mark.parametrize(("system", "machine"), [("Linux", "riscv64"), ("FreeBSD", "amd64")])
def test_elsewhere_there_are_no_kernels_and_no_instructions(on, system, machine):
    on(system, machine)
    assert (of_machine(), cpu_flags(), variants.withheld()) == ([], set(), None)
    with pytest.raises(NativeUnavailable, match="written for Linux"):
        variants.choose()


@pytest.mark.parametrize(
    ("platform", "names"),
    [
        (ARM_LINUX, ["neon_bf16", "neon"]),
        (ARM_MAC, ["neon_bf16", "neon"]),
        (ARM_WINDOWS, ["neon"]),
        (INTEL_MAC, ["avx512_bf16", "avx512", "avx2"]),
        (INTEL_WINDOWS, ["avx512_bf16", "avx512", "avx2"]),
    ],
    ids=lambda value: named(value) if isinstance(value, Platform) else None,
)
def test_a_platform_has_the_variants_whose_instructions_it_can_detect(platform, names):
    assert [variant.name for variant in of_machine(platform)] == names


@pytest.mark.parametrize(
    ("facts", "isa"),
    [
        pytest.param({"neon", "arm.FEAT_DotProd"}, "neon", id="M1"),
        pytest.param(
            {"neon", "arm.FEAT_DotProd", "arm.FEAT_I8MM", "arm.FEAT_BF16"}, "neon_bf16", id="M2"
        ),
    ],
)
def test_macos_says_by_sysctl_what_an_arm_processor_has(on, monkeypatch, facts, isa):
    on("Darwin", "arm64")
    monkeypatch.setattr(platforms, "sysctl", lambda name: name.partition(".optional.")[2] in facts)
    assert variants.choose().name == isa


def test_a_mac_whose_system_says_nothing_has_no_kernels(on, monkeypatch):
    on("Darwin", "arm64")
    monkeypatch.setattr(platforms, "sysctl", lambda name: 0)
    with pytest.raises(NativeUnavailable, match="the processor has no asimd, asimddp"):
        variants.choose()


def test_windows_says_by_number_what_an_arm_processor_has(on, monkeypatch):
    on("Windows", "ARM64")
    monkeypatch.setattr(platforms, "feature_of_windows", lambda number: number in (19, 43))
    assert variants.choose().name == "neon"


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "x86_64"), ("Windows", "AMD64")])
@pytest.mark.parametrize(
    ("facts", "isa"),
    [
        ({"AVX2", "FMA3", "F16C"}, "avx2"),
        (set(BY_NUMPY.values()) - {"AVX512BF16"}, "avx512"),
        (set(BY_NUMPY.values()), "avx512_bf16"),
    ],
)
def test_other_systems_take_numpys_word_for_an_x86_processor(
    on, monkeypatch, system, machine, facts, isa
):
    on(system, machine)
    monkeypatch.setattr(platforms, "features_by_numpy", lambda: dict.fromkeys(facts, True))
    assert variants.choose().name == isa


@pytest.mark.skipif(platform_named() != platform_named("Linux", "x86_64"), reason="needs x86-64")
def test_numpy_says_of_this_processor_what_linux_does():
    features = platforms.features_by_numpy()
    theirs = {name for name, key in BY_NUMPY.items() if features.get(key)}
    assert theirs == cpu_flags() & set(BY_NUMPY)


def test_a_wheel_for_another_platform_takes_ziglang_in_its_own_words(tmp_path, ziglang):
    made = {
        path.name.split("-")[1]: path.read_text()
        for path in build_for_package(tmp_path / "lib", ARM_LINUX)
    }
    assert set(made) == {"neon", "neon_bf16"}
    assert all("-target aarch64-linux-gnu.2.28 " in command for command in made.values())
    assert "-mcpu=generic+v8_2a+dotprod " in made["neon"]
    assert "-mcpu=generic+v8_2a+dotprod+i8mm+bf16 " in made["neon_bf16"]


@pytest.mark.parametrize("platform", FOREIGN, ids=named)
def test_a_folder_for_another_system_has_its_libraries_and_nothing_else(
    tmp_path, ziglang, platform
):
    made = build_for_package(tmp_path / "lib", platform)
    assert sorted(made) == sorted((tmp_path / "lib").iterdir())
    assert {path.suffix for path in made} == {platform.suffix}
    assert len(made) == len(of_machine(platform))
    assert all(f"-target {platform.target} " in path.read_text() for path in made)


@pytest.mark.parametrize("platform", FOREIGN, ids=named)
def test_a_library_of_a_wheel_is_taken_by_the_system_that_it_is_for(
    tmp_path, ziglang, on, monkeypatch, platform
):
    made = build_for_package(tmp_path / "lib", platform)
    monkeypatch.setattr(building, "PACKAGED", tmp_path / "lib")
    on(platform.system, platform.machine)
    assert [building.find(tmp_path / "cache", each) for each in of_machine()] == made


@pytest.mark.parametrize("platform", FOREIGN, ids=named)
def test_without_ziglang_nothing_is_compiled_for_another_system(tmp_path, monkeypatch, platform):
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    with pytest.raises(NativeUnavailable, match=f"only ziglang compiles for {platform.machine}"):
        build_for_package(tmp_path, platform)


def test_windows_compiles_nothing_and_opens_nothing_but_the_wheels(
    tmp_path, ziglang, on, monkeypatch
):
    on("Windows", "AMD64")
    with pytest.raises(NativeUnavailable, match="in a wheel or not at all"):
        find_compiler()
    monkeypatch.delattr("os.geteuid")
    with pytest.raises(NativeUnavailable, match="does not say by owner and mode"):
        building.check_trusted(tmp_path / "kernels.dll")


AS_ON_WINDOWS = """
import os, platform, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "readline", "syslog"):
    sys.modules[name] = None  # an import of it fails
for name in ("geteuid", "getuid", "sched_getaffinity", "mkfifo"):
    delattr(os, name)
platform.system, platform.machine = lambda: "Windows", lambda: "AMD64"
import transformers_api
from transformers_api.kernels import abi, build, platforms, provider, variants
platforms.features_by_numpy = lambda: {"AVX2": True, "FMA3": True, "F16C": True}
made = provider.KernelProvider(build.SOURCES.with_name("no-such-folder"), 2)
assert made.library(wait=True) is None
print(variants.choose().name, "|", made.why_not)
"""


def test_the_kernels_are_importable_without_what_windows_lacks():
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    isa, reason = done.stdout.split(" | ")
    assert isa == "avx2"
    assert "on windows kernels come in a wheel or not at all" in reason


def exports_of_macos(data: bytes) -> set[str]:
    """The defined external symbols of a Mach-O library, by its symbol table."""
    magic, *_, commands, _, _, _ = struct.unpack_from("<8I", data)
    assert magic == 0xFEEDFACF
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command == 2:  # LC_SYMTAB
            symbols, count, strings, _ = struct.unpack_from("<4I", data, at + 8)
        at += size
    entries = (struct.unpack_from("<IBBHQ", data, symbols + 16 * i) for i in range(count))
    starts = [strings + name for name, kind, *_ in entries if kind & 0x0F == 0x0F]
    return {data[start : data.index(0, start)].decode().removeprefix("_") for start in starts}


def exports_of_windows(data: bytes) -> set[str]:
    """The names in the export directory of a PE library."""
    head = struct.unpack_from("<I", data, 0x3C)[0]
    assert data[head : head + 4] == b"PE\0\0"
    sections, optional = struct.unpack_from("<H", data, head + 6)[0], head + 24
    table = optional + struct.unpack_from("<H", data, head + 20)[0]
    spans = [struct.unpack_from("<4I", data, table + 40 * i + 8) for i in range(sections)]

    def place(address: int) -> int:
        return next(
            address - start + raw
            for size, start, _, raw in spans
            if start <= address < start + size
        )

    directory = place(struct.unpack_from("<I", data, optional + 112)[0])
    count, _, names = struct.unpack_from("<3I", data, directory + 24)
    starts = [place(struct.unpack_from("<I", data, place(names) + 4 * i)[0]) for i in range(count)]
    return {data[start : data.index(0, start)].decode() for start in starts}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("ziglang") is None, reason="needs the package ziglang: make wheel")
@pytest.mark.parametrize("platform", FOREIGN, ids=named)
def test_ziglang_compiles_libraries_that_export_every_function(tmp_path, monkeypatch, platform):
    of_all = of_machine(platform)
    cheapest = [variant for variant in of_all if variant.name == CHEAPEST[platform.machine]]
    monkeypatch.setattr(building, "of_machine", lambda target: cheapest)
    (path,) = build_for_package(tmp_path, platform)
    exports = exports_of_macos if platform.system == "macos" else exports_of_windows
    assert exports(path.read_bytes()) >= EXPORTED

"""The border to the compiled kernels: a library that differs from abi.py is refused."""

from __future__ import annotations

import ctypes
import json
import re

import pytest

from transformers_api.kernels.abi import ABI_VERSION, OPS, SIGNATURES, Layout, Library
from transformers_api.kernels.build import SOURCES, LibraryRefused


@pytest.fixture
def layout(library_file) -> str:
    """The layout that the real library states."""
    library = ctypes.CDLL(str(library_file))
    library.abi_layout.restype = ctypes.c_char_p
    return library.abi_layout().decode()


def source(version: int, layout: str) -> str:
    """A library that states this ABI and has nothing else."""
    return f"""extern "C" {{
      int abi_version() {{ return {version}; }}
      const char* abi_layout() {{ return {json.dumps(layout)}; }}
    }}"""


def test_the_layout_of_the_library_is_the_one_that_python_declares(layout):
    assert Layout.parse(layout) == Layout.own()


def test_every_function_of_the_header_has_a_signature():
    header = (SOURCES / "abi.h").read_text()
    names = re.findall(r"^\w[\w* ]* \*?(\w+)\((?!\w+\()", header, re.MULTILINE)
    assert {*names} - {"abi_version", "abi_layout", "enum"} == SIGNATURES.keys()


@pytest.mark.parametrize(
    ("pattern", "other", "message"),
    [
        pytest.param(
            "struct Weight 40",
            "struct Weight 48",
            "struct Weight has 48 bytes in it, and 40",
            id="size",
        ),
        pytest.param(
            "struct Weight 40", "struct Wait 40", "struct Weight has None bytes", id="gone"
        ),
        pytest.param(" k:16", " k:20", "Weight.k is at byte 20 in it, and at 16 here", id="offset"),
        pytest.param(
            "ops copy add", "ops add copy", "operation 0 is add in it, and copy", id="order"
        ),
        pytest.param(
            " unpack_rows",
            "",
            f"operation {len(OPS) - 1} is None in it, and unpack_rows",
            id="fewer",
        ),
        pytest.param("types F32:0", "types F32:7", "type F32 is 7 in it, and 0 here", id="type"),
        pytest.param(
            "struct Weight 40", "struct Weight x", "does not state its ABI", id="nonsense"
        ),
    ],
)
def test_a_library_of_another_layout_is_refused_and_the_difference_is_named(
    compile_source, layout, pattern, other, message
):
    assert pattern in layout
    path = compile_source(source(ABI_VERSION, layout.replace(pattern, other, 1)))
    with pytest.raises(LibraryRefused, match=re.escape(message)):
        Library(path, 1)


def test_a_library_of_another_version_is_refused_and_both_are_named(compile_source, layout):
    path = compile_source(source(ABI_VERSION + 1, layout))
    message = f"its ABI has version {ABI_VERSION + 1}, and this program needs {ABI_VERSION}"
    with pytest.raises(LibraryRefused, match=message):
        Library(path, 1)


def test_a_library_that_does_not_state_its_abi_is_refused(compile_source):
    path = compile_source('extern "C" int set_threads(int) { return 0; }')
    with pytest.raises(LibraryRefused, match="does not state its ABI"):
        Library(path, 1)


def test_a_library_that_lacks_a_function_is_refused(compile_source, layout):
    path = compile_source(source(ABI_VERSION, layout))
    with pytest.raises(LibraryRefused, match="it has no function set_threads"):
        Library(path, 1)

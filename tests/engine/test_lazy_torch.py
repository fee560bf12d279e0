"""transformers without torch's compiler, which is there as soon as somebody wants it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import import_utils

import transformers_api
from transformers_api.engine.platform.lazy_torch import VERSIONS
from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.engine.platform.transformers_exports import scanning_once, use_list

PROGRAM = """
import collections
import sys

from transformers_api.engine.platform.lazy_torch import import_torch

opened = collections.Counter()
sys.addaudithook(lambda event, given: opened.update([given[0]]) if event == "open" else None)
import_torch(transformers=True)
import torch
import transformers_api.engine.loader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers_api.engine.platform.transformers_exports import scanning_once
from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.kernels.capture import record

sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
config = LlamaConfig(intermediate_size=16, num_key_value_heads=1, **sizes)
with ShapesOnly(), torch.device("meta"):
    LlamaForCausalLM(config)
model = LlamaForCausalLM(config)
ids = torch.tensor([[1, 2]])
with torch.no_grad(), record([ids]):
    model(ids, use_cache=False)
heavy = {"sympy", "torch._dynamo.convert_frame", "torch.distributed.tensor", "torch._decomp"}
heavy |= {"accelerate", "torch.export.graph_signature", "torch.masked._ops"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
sources = [name for name in opened if str(name).endswith("modeling_zoedepth.py")]
assert [opened[name] for name in sources] == [1], "read more than once, or looked for elsewhere"
assert torch.Generator().manual_seed(1).initial_seed() == 1
with ShapesOnly(), torch.device("meta"):  # which no kernel of torch's says without
    assert torch.nn.Conv2d(3, 4, 3)(torch.empty(1, 3, 8, 8)).shape == (1, 4, 6, 6)
assert "torch._decomp" in sys.modules
assert torch.broadcast_shapes((2, 1), (3,)) == (2, 3)

known = torch.compiler.allow_in_graph(lambda x: x + 1)
kept = torch.compiler.disable(lambda x: x + torch.ones(len(x.tolist())))
assert kept(torch.ones(2)).tolist() == [2, 2]
import torch._dynamo.utils
from torch._dynamo.trace_rules import is_callable_allowed

assert is_callable_allowed(known)
compiled = torch.compile(lambda x: kept(x * 2) + 1, backend="eager")
assert compiled(torch.ones(2)).tolist() == [4, 4]
assert torch._dynamo.utils.counters["graph_break"]
assert torch.distributed.is_available() == hasattr(torch._C, "_c10d_init")

from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
table = torch.arange(6.0).view(2, 3).requires_grad_()
with TransformGetItemToIndex():  # whose function the exporter is to know
    torch.vmap(lambda row: table[row, 0])(torch.tensor([1, 0])).sum().backward()
assert table.grad.tolist() == [[1, 0, 0], [1, 0, 0]]
from torch.export.graph_signature import InputKind
assert torch.export.graph_signature.InputKind is InputKind and torch.export.Dim
import torch.nn.intrinsic.modules.fused
assert torch.nn.intrinsic.LinearReLU is torch.nn.intrinsic.modules.fused.LinearReLU
assert torch.masked.masked_tensor and torch.quantization.quantize_dynamic

import transformers.modeling_utils
assert transformers.modeling_utils.extract_model_from_parallel(model) is model
import accelerate.utils
assert accelerate.utils.extract_model_from_parallel(model) is model
"""


def test_a_model_is_made_without_the_compiler_and_the_compiler_works_afterwards(
    tmp_path: Path,
) -> None:
    program = tmp_path / "program.py"  # torch compiles nothing that stands in no file
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(transformers_api.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


OTHER_VERSION = """
import logging
import sys
import types

from transformers_api.engine.platform import lazy_torch

logging.basicConfig(level=logging.INFO)
lazy_torch.VERSIONS["torch"] = "0.1"
lazy_torch.import_torch()
lazy_torch.import_torch(transformers=True)
assert type(sys.modules["torch._meta_registrations"]) is types.ModuleType
assert type(sys.modules.get("torch._dynamo", types)) is types.ModuleType
assert "transformers" in sys.modules
"""


def test_another_version_is_imported_as_a_whole_with_one_line_in_the_log() -> None:
    done = subprocess.run([sys.executable, "-c", OTHER_VERSION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Imported as a whole") == 1


def test_the_versions_are_those_that_are_installed_with_the_program() -> None:
    requirements = (Path(transformers_api.__file__).parents[1] / "requirements.txt").read_text()
    assert all(f"{name}=={version}" in requirements.split() for name, version in VERSIONS.items())


def angles(size: int) -> Tensor:
    return 1.0 / (100.0 ** (torch.arange(0, size, 2, dtype=torch.float) / size))


def test_shapes_on_meta_are_what_they_would_be() -> None:
    def made() -> list[Tensor]:
        layers = [nn.Linear(3, 4), nn.Embedding(5, 6), nn.LayerNorm(7), nn.Conv1d(1, 2, 3)]
        return [angles(8), torch.arange(3), *(p for layer in layers for p in layer.parameters())]

    with torch.device("meta"):
        plain = made()
        with ShapesOnly():
            quick = made()
    assert [(t.shape, t.dtype, t.device) for t in quick] == [
        (t.shape, t.dtype, t.device) for t in plain
    ]


def test_tensors_with_numbers_get_them() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 4).weight, angles(8)
    torch.manual_seed(0)
    with ShapesOnly():
        same = nn.Linear(3, 4).weight, angles(8)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_a_folder_that_is_scanned_once_exports_what_it_does(tmp_path: Path) -> None:
    files = {
        "modeling_a.py": 'class A: ...\n\n\n__all__ = ["A", "B"]\n',
        "b/tokenization_b.py": '__all__ = [\n    "C",\n]\n# __all__ is above\n',
        "b/c/processing_c.py": '@requires(backends=("vision",))\nclass D: ...\n__all__ = ["D"]\n',
        "b/__init__.py": "",
        "none.py": "__all = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def found() -> list[object]:
        import_utils.define_import_structure.cache_clear()
        ways = tmp_path, str(tmp_path / "modeling_a.py"), str(tmp_path / "b" / "__init__.py")
        return [import_utils.define_import_structure(way) for way in ways]

    plain = found()
    with scanning_once(import_utils):
        assert found() == plain


def scanner(folder: Path) -> Any:
    """Transformers' ``import_utils``, as it would be in ``folder``."""
    import_utils.define_import_structure.cache_clear()
    import_utils.create_import_structure_from_path.cache_clear()
    file = str(folder / "utils" / "import_utils.py")
    return SimpleNamespace(
        __file__=file, define_import_structure=import_utils.define_import_structure
    )


def unread(_path: object, _prefix: str | None = None) -> object:
    raise AssertionError("the sources are read again")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    models = tmp_path / "package" / "models"
    (models / "a").mkdir(parents=True)
    (models / "a" / "modeling_a.py").write_text('__all__ = ["A", "B"]\n')
    (models / "a" / "__init__.py").touch()
    (models / "__init__.py").touch()
    return tmp_path / "package"


def exports(scanner: Any, models: Path, lists: Path) -> list[object]:
    use_list(scanner, lists)
    define = scanner.define_import_structure
    return [define(models, prefix="models"), define(str(models / "__init__.py"))]


def test_exports_are_the_same_by_a_list_and_nothing_is_read_again(
    package: Path, tmp_path: Path
) -> None:
    models, own = package / "models", scanner(package)
    plain = [
        own.define_import_structure(models, prefix="models"),
        own.define_import_structure(str(models / "__init__.py")),
    ]
    assert exports(own, models, tmp_path) == plain
    own = scanner(package)
    own.define_import_structure = unread
    assert exports(own, models, tmp_path) == plain
    with pytest.raises(AssertionError, match="again"):
        own.define_import_structure(models / "a")


def test_a_damaged_list_and_one_of_another_version_are_made_anew(
    package: Path, tmp_path: Path
) -> None:
    models = package / "models"
    plain = exports(scanner(package), models, tmp_path)
    (file,) = tmp_path.glob("*.exports")
    file.write_bytes(file.read_bytes().replace(b"modeling_a", b"modeling_b"))
    assert exports(scanner(package), models, tmp_path) == plain
    assert b"modeling_a" in file.read_bytes()
    (models / "b").mkdir()
    (models / "b" / "modeling_b.py").write_text('__all__ = ["C"]\n')
    assert exports(scanner(package), models, tmp_path) != plain
    assert len(list(tmp_path.glob("*.exports"))) == 1
    assert not file.exists()


def of_another_user(file: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(file, 4711, 4711)


def as_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("spoil", [of_another_user, as_a_pipe, as_a_folder])
def test_a_list_that_nobody_here_has_written_is_not_used(
    package: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    models = package / "models"
    plain = exports(scanner(package), models, tmp_path)
    (file,) = tmp_path.glob("*.exports")
    file.write_bytes(hashlib.sha256(b"[]").digest() + b"[]")  # whole, and wrong
    spoil(file)
    assert exports(scanner(package), models, tmp_path) == plain


def test_without_a_folder_to_write_into_the_sources_are_read(package: Path) -> None:
    models = package / "models"
    plain = scanner(package).define_import_structure(models, prefix="models")
    assert exports(scanner(package), models, models / "__init__.py")[0] == plain


ASYNC = """
import importlib

from transformers_api.engine.platform.imports import COMPILED

for name in COMPILED:
    importlib.import_module(name)
import asyncio

async def current():
    async with asyncio.timeout(9):
        return asyncio.current_task()

assert asyncio.run(current()) is not None
"""


def test_compiled_modules_that_are_imported_first_leave_asyncio_whole():
    subprocess.run([sys.executable, "-c", ASYNC], check=True)

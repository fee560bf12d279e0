"""The shape of the package, as docs/architecture.md draws it: who imports whom, how long things are."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "transformers_api"
OURS = "transformers_api"
HTTP = {"flask", "flask_cors", "flask_smorest", "marshmallow", "werkzeug", "webargs", "gunicorn"}
MODELS = {"accelerate", "gguf", "huggingface_hub", "safetensors", "tokenizers", "transformers"}


@dataclass(frozen=True)
class Layer:
    """What the modules of a layer may import of ours, and what they may not of others."""

    ours: frozenset[str]
    never: frozenset[str] = frozenset()


def layer(*ours: str, never: set[str] | None = None) -> Layer:
    return Layer(frozenset(ours), frozenset(never or ()))


LEAVES = ("errors", "logs", "config", "heap", "memory")
# The longest name that fits a module holds. `engine.base`, `inspection.base` and its `edit_plan` are
# data and protocols: all may know them.
LAYERS = {
    "": layer(),
    "errors": layer(never=HTTP | MODELS | {"torch"}),
    "config": layer("config", never=HTTP | MODELS | {"torch"}),
    "logs": layer(never=HTTP | MODELS | {"torch"}),
    "heap": layer(never=HTTP | MODELS | {"torch"}),
    "memory": layer(never=HTTP | MODELS | {"torch"}),
    "metric_names": layer(never=HTTP | MODELS | {"torch"}),
    "tallies": layer(
        "engine.base",
        "metric_names",
        "serving.constraints.listener",
        never=HTTP | MODELS | {"torch"},
    ),
    "kernels": layer("kernels", "errors", "logs", "heap", never=HTTP),
    "families": layer("families", never=HTTP),
    "checkpoints.headers": layer("checkpoints.headers", "errors", never=HTTP | MODELS | {"torch"}),
    "checkpoints": layer("checkpoints", "families", "engine.platform", *LEAVES, never=HTTP),
    "engine.base": layer("engine.adapter_source", "errors", never=HTTP | MODELS | {"torch"}),
    "engine.adapter_source": layer(never=HTTP | MODELS | {"torch"}),
    "engine": layer(
        *("engine", "families", "checkpoints.headers", "errors", "logs", "heap", "memory"),
        never=HTTP,
    ),
    "engine.native": layer(
        *("engine", "kernels", "families", "errors", "logs", "memory"), never=HTTP
    ),
    "inspection.base": layer(
        "errors",
        "inspection.activations",
        "inspection.attribution_question",
        "inspection.divergence_question",
        "inspection.editable",
        "inspection.grid_question",
        "inspection.sae",
        "inspection.lens_maps",
        "inspection.logit_share",
        "inspection.probes",
        "inspection.uncertainty",
        never=HTTP | MODELS | {"torch"},
    ),
    "inspection.edit_plan": layer(
        "inspection.base",
        "inspection.editable",
        "inspection.sae",
        "errors",
        never=HTTP | MODELS | {"torch"},
    ),
    "inspection.questions": layer(
        *(
            "inspection.attribution_question",
            "inspection.base",
            "inspection.edit_plan",
            "inspection.attribution_question",
            "inspection.divergence_question",
            "inspection.editable",
            "inspection.grid_question",
            "inspection.sae",
            "inspection.sae",
            "inspection.lens_maps",
            "inspection.lens_maps",
            "inspection.logit_share",
        ),
        never=HTTP | MODELS | {"torch"},
    ),
    "inspection.editable": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.activations": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.attribution_question": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.uncertainty": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.probes": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.divergence_question": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.grid_question": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.lens_maps": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.sae": layer(never=HTTP | MODELS | {"torch"}),
    "inspection.logit_share": layer(never=HTTP | MODELS | {"torch"}),
    "inspection": layer("inspection", "engine", "errors", "logs", never=HTTP),
    "serving": layer(
        "serving",
        "engine.base",
        "engine.adapter_source",
        "inspection.base",
        "inspection.questions",
        "inspection.edit_plan",
        "inspection.activations",
        "inspection.attribution_question",
        "inspection.divergence_question",
        "inspection.editable",
        "inspection.grid_question",
        "inspection.logit_share",
        "inspection.sae",
        "inspection.lens_maps",
        "inspection.probes",
        "inspection.uncertainty",
        "checkpoints.headers",
        *LEAVES,
        never=HTTP | MODELS | {"torch"},
    ),
    "api": layer(
        "api",
        "serving",
        "engine.base",
        "inspection.activations",
        "inspection.attribution_question",
        "inspection.base",
        "inspection.questions",
        "inspection.edit_plan",
        "inspection.attribution_question",
        "inspection.divergence_question",
        "inspection.editable",
        "inspection.grid_question",
        "inspection.sae",
        "inspection.lens_maps",
        "inspection.logit_share",
        "inspection.uncertainty",
        *LEAVES,
        never=MODELS | {"torch", "gunicorn"},
    ),
    "server.http_parser": layer("errors", never=HTTP | MODELS | {"torch"}),
}
# These wire the layers together, and nobody imports them but one another.
WIRING = {
    "__main__",
    "app",
    "check",
    "cli",
    "cluster",
    "encoder_loader",
    "engines",
    "local_engine",
    "metrics",
    "adapter_loader",
    "model_facts",
    "model_loader",
    "server",
    "sidecar_writer",
    "tokenizer_loader",
}
# One module of a layer that otherwise leaves a library alone.
EXCEPTIONS = {
    "checkpoints.headers.gguf_adapter": {"gguf"},
    "checkpoints.headers.gguf_file": {"gguf"},
    "serving.models.hub": {"huggingface_hub"},
}

LOADING = {
    "engine/pretrained.py",
    "engine/encoder.py",
    "checkpoints/convert.py",
    "checkpoints/parameter_shapes.py",
}


@functools.cache
def modules() -> dict[str, Path]:
    return {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def name(path: Path) -> str:
    """The module's name below the package; the package itself is ``""``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(tree(path))]


@pytest.fixture(autouse=True, scope="module")
def let_go() -> Iterator[None]:
    """Keep millions of nodes from being looked through by every collection of later tests."""
    yield
    for cached in (tree, nodes, distributions):
        cached.cache_clear()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield child
            yield from statements(child)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import in a file, lazy ones and those for typing included."""
    for node in statements(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            yield from ((node.lineno, target) for target in targets(node))


def targets(node: ast.ImportFrom) -> Iterator[str]:
    """``from package import module`` imports package.module."""
    module = node.module or ""
    for alias in node.names:
        full = f"{module}.{alias.name}"
        is_module = full.removeprefix(f"{OURS}.") in modules()
        yield full if module.split(".")[0] == OURS and is_module else module


def is_within(module: str, parent: str) -> bool:
    return parent == "" or module == parent or module.startswith(f"{parent}.")


def layer_of(module: str) -> Layer | None:
    names = [name for name in (*LAYERS, *WIRING) if name and is_within(module, name)]
    assert names or module == "", f"{module} belongs to no layer: name it in LAYERS or WIRING"
    return LAYERS.get(max(names, key=len, default=""))


def complaint(module: str, imported: str) -> str | None:
    top, target = imported.split(".")[0], imported.removeprefix(OURS).removeprefix(".")
    rules = layer_of(module)
    if rules is None:  # wiring
        return "may not know the kernels" if top == OURS and is_within(target, "kernels") else None
    if top == OURS:
        if target and not any(is_within(target, allowed) for allowed in rules.ours):
            return f"may import {', '.join(sorted(rules.ours)) or 'nothing'} of ours"
    elif top in rules.never and top not in EXCEPTIONS.get(module, set()):
        return f"may not know {top}"
    return None


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_a_module_imports_only_what_its_layer_may_know():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}, but {reason}"
        for module, path in modules().items()
        for line, imported in imports(path)
        if (reason := complaint(module, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        pytest.param("serving.swap.swapper", "flask", id="serving meets HTTP"),
        pytest.param("serving.swap.swapper", "torch", id="serving meets tensors"),
        pytest.param("api.openai.views", "transformers", id="HTTP meets models"),
        pytest.param(
            "api.openai.views", f"{OURS}.engine.llm_engine", id="HTTP meets the engine's inside"
        ),
        pytest.param("engine.llm_engine", f"{OURS}.serving.models.spec", id="an import upwards"),
        pytest.param("engine.base", "torch", id="the protocol meets torch"),
        pytest.param("serving.swap.swapper", f"{OURS}.app", id="the wiring is imported"),
        pytest.param(
            "engine.llm_engine", f"{OURS}.inspection.base", id="the engine looks into itself"
        ),
        pytest.param("api.openai.views", f"{OURS}.inspection.trace", id="HTTP meets the tap"),
        pytest.param("kernels.abi", f"{OURS}.engine.base", id="the kernels meet the engine"),
        pytest.param("engine.llm_engine", f"{OURS}.kernels.abi", id="the engine meets the kernels"),
        pytest.param("engine.loader", f"{OURS}.kernels.abi", id="the loader meets the kernels"),
        pytest.param("inspection.trace", f"{OURS}.kernels.stats", id="traces meet the kernels"),
        pytest.param("metrics", f"{OURS}.kernels.build", id="the wiring meets the kernels"),
    ],
)
def test_a_forbidden_import_is_noticed(module, imported):
    assert complaint(module, imported)


def test_a_permitted_import_is_not_complained_about():
    assert complaint("api.openai.views", f"{OURS}.engine.base") is None
    assert complaint("app", "torch") is None


def test_files_stay_short():
    files = [path for ending in ("py", "cpp", "h") for path in PACKAGE.rglob(f"*.{ending}")]
    long = [
        f"{path.relative_to(ROOT)} has {lines} lines"
        for path in files
        if (lines := len(path.read_text().splitlines())) > 400
    ]
    assert not long, "\n".join(long)


def test_functions_stay_short():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines"
        for path in modules().values()
        for node in functions(path)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > 60
    ]
    assert not long, "\n".join(long)


def test_instructions_of_a_processor_are_named_in_headers_of_their_own():
    intrinsic = re.compile(r"\b_mm\d*_|\b__m(\d|mask)|\b_tile_|immintrin|\bv\w+q_[fsu]\d")
    sources = [*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]
    assert {path.name for path in sources if intrinsic.search(path.read_text())} == {
        f"{what}_{isa}.h" for what in ("simd", "dots") for isa in ("amx", "avx2", "avx512", "neon")
    }


def test_the_library_of_grammars_is_met_in_two_modules():
    users = {
        module
        for module, path in modules().items()
        if any(target.split(".")[0] == "llguidance" for _, target in imports(path))
    }
    assert users == {"serving.constraints.compiler", "serving.constraints.grammar"}


def test_only_the_config_reads_the_environment():
    reads = [
        f"{path.relative_to(ROOT)}:{node.lineno} uses os.{used}"
        for module, path in modules().items()
        if module not in ("config.settings", "config.environment")
        for node in nodes(path)
        if (used := environment_use(node))
    ]
    assert not reads, "\n".join(reads)


def environment_use(node: ast.AST) -> str | None:
    names = {"environ", "environb", "getenv", "putenv"}
    if isinstance(node, ast.Attribute) and node.attr in names:
        return node.attr if ast.unparse(node.value) == "os" else None
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return next((alias.name for alias in node.names if alias.name in names), None)
    return None


def test_models_are_loaded_in_one_place():
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno} calls {node.attr}"
        for path in modules().values()
        if str(path.relative_to(PACKAGE)) not in LOADING
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and node.attr in ("from_pretrained", "from_config")
        and ast.unparse(node.value) != "AutoTokenizer"
    ]
    assert not calls, "\n".join(calls)


def test_importing_the_torch_free_parts_leaves_torch_out():
    parts = ("api", "cli", "app", "config.settings", "serving")
    parts += ("engine.base", "inspection.base", "inspection.questions")
    lines = [
        f"import {OURS}.{part}\nprint('{part}:', *{{'torch', 'transformers'}} & set(sys.modules))"
        for part in parts
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{part}:" for part in parts]


@functools.cache
def distributions() -> dict[str, list[str]]:
    # That of an extra is not in every environment.
    return {"grpc": ["grpcio"], **importlib.metadata.packages_distributions()}


@pytest.mark.parametrize(
    ("folders", "requirements"),
    [
        pytest.param(
            ["transformers_api"], ["requirements.txt", "requirements-ray.txt"], id="run time"
        ),
        pytest.param(
            ["tests", "examples", "benchmarks", "scripts"],
            ["requirements.txt", "requirements-dev.txt", "requirements-ray.txt"],
            id="development",
        ),
    ],
)
def test_every_import_is_pinned_in_the_requirements(folders, requirements):
    text = "\n".join((ROOT / name).read_text() for name in requirements)
    pinned = set(re.findall(r"^([\w.-]+)(?:\[\w+\])?==", text, re.MULTILINE))
    # Programs for others, each in its own environment.
    theirs = (ROOT / "tests" / "clients", ROOT / "tests" / "inspection" / "libraries")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files = [path for path in files if not any(map(path.is_relative_to, theirs))]
    imported = {target.split(".")[0] for path in files for _, target in imports(path)}
    own = {path.stem for path in ROOT.iterdir()}
    missing = {
        module
        for module in imported - own - {*sys.stdlib_module_names}
        if not {canonical(name) for name in distributions().get(module, [module])} & pinned
    }
    assert "torch" in imported
    assert not missing


def canonical(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_folder_says_what_it_is_and_where_to_start():
    missing = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("__init__.py")
        if not ast.get_docstring(tree(path))
    ]
    assert not missing


# Names that say nothing of the thing, or are words of our own where the field has one.
NAMELESS = frozenset(
    [
        "known",
        "given",
        "wanted",
        "found",
        "told",
        "said",
        "seen",
        "kept",
        "asked",
        "shown",
        "begun",
        "noted",
        "heard",
        "thing",
        "things",
        "stuff",
        "courier",
        "exchange",
        "desk",
        "race",
        "lean",
    ]
)
RELATIVE = ("what ", "whether ", "who ", "where ", "when ", "how ")


def bound_name(node: ast.AST) -> str | None:
    """The name that ``node`` gives to something."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            return name
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=name):
            return name
        case ast.arg(arg=name) | ast.alias(asname=name) | ast.MatchAs(name=name):
            return name
    return None


def vague(path: Path) -> Iterator[str]:
    for node in nodes(path):
        name = bound_name(node)
        if name and name.strip("_").lower() in NAMELESS:
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} calls something {name}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if first.lower().startswith(RELATIVE):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} opens with {first!r}"


def test_names_say_what_a_thing_is_and_docstrings_open_with_it():
    wrong = [fault for path in modules().values() for fault in vague(path)]
    assert not wrong, "\n".join(wrong)


def test_vague_names_and_openings_are_noticed(tmp_path, monkeypatch):
    file = tmp_path / "vague.py"
    file.write_text('"""What it is."""\ndef f(given):\n    known = self.said = given\n')
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(list(vague(file))) == 4

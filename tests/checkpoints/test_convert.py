from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from transformers_api.checkpoints.publish import MANIFEST, VERSION, is_intact
from transformers_api.config.settings import Settings
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.models.store import CONVERSION, CONVERTER_VERSION, ModelStore

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADS, KV_HEADS, EOS, END_OF_TURN = 4, 2, 0, 2


def byte_alphabet() -> list[str]:
    """The characters that byte-level BPE writes for the bytes 0..255 (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def tiny_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=3 + 256 + 1,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    ).eval()


def write_gguf(model: Any, path: Path, pre: str | None = "smollm") -> Path:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    alphabet = byte_alphabet()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he"]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END_OF_TURN)
    writer.add_chat_template(TEMPLATE)
    for name, weight in gguf_tensors(model).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Any) -> dict[str, Any]:
    def interleaved(weight: Any, heads: int) -> Any:
        # GGUF's llama stores the two halves of a rotated head alternating
        half = weight.shape[0] // heads // 2
        return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape).copy()

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    return tensors


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def source(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(original, tmp_path_factory.mktemp("gguf") / "tiny model.gguf")


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def store(store_folder: Path) -> ModelStore:
    return ModelStore(Settings(model_store=store_folder, hf_home=store_folder / "hf"))


@pytest.fixture(scope="module")
def folder(store: ModelStore, source: Path) -> Path:
    """Where the store has put the conversion; made once for the tests that only look at it."""
    return store.prepare(spec_of(source), lambda share, what: None).folder


def spec_of(source: Path) -> ModelSpec:
    return ModelSpec(name="tiny", source=PathSource(source))


def converter(source: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "transformers_api.checkpoints.convert", str(source), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(stream: IO[str] | None, text: str) -> None:
    assert stream is not None
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"the output ended before {text!r}")


def test_converted_model_computes_what_the_original_computes(original: Any, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.checkpoints.gguf_models import state_dict

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    model.load_state_dict(state_dict(folder), strict=False)
    model.tie_weights()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-5)


def test_tied_weights_are_stored_once(original: Any, store: ModelStore, source: Path) -> None:
    files = store.prepare(spec_of(source), lambda share, what: None)
    parameters = sum(weight.numel() for weight in original.parameters())
    assert (files.parameters, files.weight_bytes) == (parameters, 4 * parameters)


def test_tokenizer_chat_template_and_end_tokens_survive(folder: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "hello, wörld 😀 12"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[0] == 259
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "he"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"][0] == 1
    assert tokenizer.eos_token_id == EOS
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [EOS, END_OF_TURN]


def test_second_use_finds_the_conversion(
    store: ModelStore, store_folder: Path, source: Path, folder: Path
) -> None:
    heard: list[str] = []
    files = store.prepare(spec_of(source), lambda share, what: heard.append(what))
    assert heard == ["ready"]
    assert files.folder == folder == store.locate(spec_of(source))
    assert folder.parent == store_folder
    assert folder.name.startswith("tiny-model-")
    assert is_intact(folder)


def test_changed_source_is_another_conversion(
    store: ModelStore, source: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / source.name).write_bytes(source.read_bytes())
    assert store.locate(spec_of(source)) == folder
    assert store.locate(spec_of(tmp_path / source.name)) is None


def test_damaged_conversion_is_made_again(store: ModelStore, source: Path, folder: Path) -> None:
    weights = folder / "weights.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    assert not is_intact(folder)
    heard: list[str] = []
    store.prepare(spec_of(source), lambda share, what: heard.append(what))
    assert "damaged" in heard[0]
    assert "mapping the weights" in heard
    assert weights.read_bytes() == whole
    assert is_intact(folder)


def test_conversion_of_an_earlier_version_is_made_again(
    store: ModelStore, source: Path, folder: Path
) -> None:
    record = folder / "conversion.json"
    for version in ({}, {"version": VERSION - 1}, {"version": VERSION + 1}):
        manifest = json.loads(record.read_text())
        manifest.pop("version", None)
        record.write_text(json.dumps(manifest | version))
        assert not is_intact(folder)
        assert not store.is_cached(spec_of(source))
    heard: list[str] = []
    store.prepare(spec_of(source), lambda share, what: heard.append(what))
    assert "earlier version" in heard[0]
    assert is_intact(folder)
    assert store.is_cached(spec_of(source))


def test_a_folder_with_one_gguf_file_is_that_file(
    store: ModelStore, source: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny model.gguf").symlink_to(source)
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"")
    (tmp_path / "README.md").write_text("# tiny")
    assert store.prepare(spec_of(tmp_path), lambda share, what: None).folder == folder
    assert store.is_cached(spec_of(tmp_path))


def test_store_and_converter_agree_on_the_record() -> None:
    assert (CONVERSION, CONVERTER_VERSION) == (MANIFEST, VERSION)


def test_unknown_pre_tokenizer_is_refused_by_name(
    store: ModelStore, original: Any, tmp_path: Path
) -> None:
    novel = write_gguf(original, tmp_path / "novel.gguf", pre="novel")
    with pytest.raises(ModelLoadFailed, match=r"novel\.gguf: the pre-tokenizer 'novel'"):
        store.prepare(spec_of(novel), lambda share, what: None)


def test_missing_pre_tokenizer_is_warned_of(
    store: ModelStore, original: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = write_gguf(original, tmp_path / "silent.gguf", pre=None)
    store.prepare(spec_of(silent), lambda share, what: None)
    assert "tiny: silent.gguf: the file does not name its pre-tokenizer" in caplog.text


@pytest.mark.slow
def test_killed_conversion_leaves_nothing_that_looks_complete(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    first = converter(source, folder)
    with first:
        read_until(first.stdout, "reading the vocabulary")
        first.send_signal(signal.SIGKILL)
    assert not folder.exists()
    assert (tmp_path / ".model.partial").is_dir()
    stale = tmp_path / ".other.partial"
    stale.mkdir()

    second, third = converter(source, folder), converter(source, folder)
    outputs = [process.communicate(timeout=50) for process in (second, third)]
    assert (second.returncode, third.returncode) == (0, 0), outputs
    assert is_intact(folder)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["model"]
    converted = ["converting weights" in out for out, _ in outputs]
    assert sorted(converted) == [False, True], "only one of two converts, the other waits"


def test_gguf_that_is_cut_off_is_refused(store: ModelStore, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(ModelLoadFailed, match=r"broken\.gguf could not be read: .*GGUF"):
        store.prepare(spec_of(broken), lambda share, what: None)
    assert store.locate(spec_of(broken)) is None

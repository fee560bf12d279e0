"""Models whose weights stay in their file: with its very numbers, on every backend."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import transformers as tf

from tests.engine.models import prompts_of
from tests.engine.native.test_engine import bits, scored
from tests.engine.reading import GREEDY, ask, read
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.engine.standby import StandbyModels
from transformers_api.errors import ModelLoadFailed
from transformers_api.kernels.modules.linear import NativeEmbedding

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
SCALED = {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 8}
LLAMA, TIED = tf.LlamaConfig(**SIZES), tf.LlamaConfig(**SIZES, tie_word_embeddings=True)
GEMMA = tf.Gemma3TextConfig(**SIZES, **SCALED)
GPT2 = tf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128)


def model_of(config) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def stored(config, folder: Path, types=("Q8_0",), ops=None) -> tf.PreTrainedModel:
    """A folder with a model in blocks of ``types`` by turns; the model of the very same numbers.

    ``ops``: name's end -> what was done to a parameter's rows, and takes it back.
    """
    model = model_of(config)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    data, tensors = b"", {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        op = next((op for end, op in (ops or {}).items() if name.endswith(end)), None)
        values = parameter.detach().numpy()
        kind = types[number % len(types)] if values.ndim == 2 else "F32"
        if op == "transpose":
            values = numpy.ascontiguousarray(values.T)
        number = gguf.GGMLQuantizationType[kind]
        blocks = gguf.quantize(values, number)
        exact = torch.from_numpy(gguf.dequantize(blocks, number).reshape(values.shape).copy())
        tensors[name] = {
            "shape": list(parameter.shape),
            "join": None,
            "parts": [
                {
                    "file": 0,
                    "offset": len(data),
                    "bytes": blocks.nbytes,
                    "type": kind,
                    "shape": list(values.shape),
                    "ops": [{"op": op}] if op else [],
                }
            ],
        }
        with torch.no_grad():
            parameter.copy_(exact.t() if op == "transpose" else exact)
        data += blocks.tobytes() + bytes(-blocks.nbytes % 32)
    file = folder / "weights.bin"
    file.write_bytes(data)
    files = [{"path": str(file), "bytes": len(data), "mtime_ns": 0}]
    table = {"version": 1, "files": files, "tensors": tensors}
    (folder / "weights.json").write_text(json.dumps(table))
    return model


@pytest.fixture
def load(engine_thread):
    engines = []

    def load(folder, **options):
        options = {"num_slots": 4, "quantization": "gguf"} | options
        engine = engine_thread.call(
            lambda: load_engine(folder, LoadOptions(**options), engine_thread)
        ).result()
        engines.append(engine)
        return engine

    yield load
    for engine in engines:
        engine.close()


def first_logprob(engine, prompt):
    [(_, score)] = bits(engine.submit([scored(prompt, 1)]))
    return score.logprob


def plain_logprob(model, prompt):
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1).max().item()


@pytest.mark.parametrize(
    ("config", "types", "ops"),
    [
        (LLAMA, ("Q8_0",), None),
        (LLAMA, ("Q4_0", "Q8_0", "F16", "Q5_1", "F32"), None),
        (TIED, ("Q4_1",), None),
        (GEMMA, ("Q5_0",), None),
        (GPT2, ("Q8_0",), {f"{n}.weight": "transpose" for n in ("c_attn", "c_proj", "c_fc")}),
    ],
    ids=["llama", "mixed", "tied", "gemma3", "gpt2"],
)
def test_weights_of_a_file_are_served_as_they_are(load, tmp_path, native_cache, config, types, ops):
    model, prompt = stored(config, tmp_path, types, ops), prompts_of(6)[5]
    native, plain = load(tmp_path, native=native_cache), load(tmp_path)
    facts = native.describe()
    assert (facts.kernels, facts.quantization, facts.dtype) == ("native", "gguf", "bfloat16")
    assert (plain.describe().kernels, plain.describe().quantization) == ("torch", "none")
    expected = plain_logprob(model, prompt)
    assert first_logprob(plain, prompt) == pytest.approx(expected, abs=1e-4)
    assert first_logprob(native, prompt) == pytest.approx(expected, abs=0.05)


def test_packed_weights_have_the_numbers_of_the_file(load, tmp_path, native_cache):
    model = stored(LLAMA, tmp_path, ("Q4_0", "Q8_0"))
    served = innermost(load(tmp_path, native=native_cache).runner).model
    names = dict(model.named_parameters())
    for path, module in served.named_modules():
        if isinstance(module, NativeEmbedding):
            assert torch.equal(module.packed.dense(), names[f"{path}.weight"])
        elif hasattr(module, "joined"):
            parts = module.joined.weight.dense().split(module.joined.sizes)
            assert torch.equal(parts[module.index], names[f"{path}.weight"])


def test_rows_in_another_order_come_back_into_theirs(load, tmp_path, native_cache):
    """As converters for llama.cpp write what is rotated."""
    model = stored(LLAMA, tmp_path, ("Q8_0",))
    table = json.loads((tmp_path / "weights.json").read_text())
    weights = bytearray((tmp_path / "weights.bin").read_bytes())
    for name, tensor in table["tensors"].items():
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            continue
        (part,) = tensor["parts"]
        heads = 4 if "q_proj" in name else 2
        rows, size = part["shape"][0], part["bytes"] // part["shape"][0]
        here = slice(part["offset"], part["offset"] + part["bytes"])
        own = numpy.frombuffer(bytes(weights[here]), numpy.uint8).reshape(rows, size)
        there = own.reshape(heads, 2, -1, size).swapaxes(1, 2).reshape(rows, size)
        weights[here] = there.tobytes()
        part["ops"] = [{"op": "heads", "heads": heads}]
    (tmp_path / "weights.bin").write_bytes(weights)
    (tmp_path / "weights.json").write_text(json.dumps(table))
    prompt = prompts_of(6)[5]
    expected = plain_logprob(model, prompt)
    assert first_logprob(load(tmp_path), prompt) == pytest.approx(expected, abs=1e-4)
    native = load(tmp_path, native=native_cache)
    assert first_logprob(native, prompt) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
def test_another_width_can_be_asked_for(load, tmp_path, native_cache, quantization):
    model, prompt = stored(LLAMA, tmp_path, ("Q4_0",)), prompts_of(6)[5]
    engine = load(tmp_path, native=native_cache, quantization=quantization)
    assert engine.describe().quantization == quantization
    expected = plain_logprob(model, prompt)
    assert first_logprob(engine, prompt) == pytest.approx(expected, abs=0.05)


def test_a_file_of_plain_numbers_is_no_quantised_one(load, tmp_path, native_cache):
    for dtype, served in (("F16", "bfloat16"), ("F32", "float32")):
        stored(LLAMA, tmp_path / dtype, (dtype,))
        facts = load(tmp_path / dtype, native=native_cache).describe()
        assert (facts.quantization, facts.dtype) == ("none", served)


def test_a_small_model_gets_plain_numbers_unless_it_is_asked_for_as_it_is(
    load, tmp_path, native_cache
):
    stored(LLAMA, tmp_path, ("Q4_0",))
    for quantization, served in (("auto", "none"), ("gguf", "gguf")):
        engine = load(tmp_path, native=native_cache, quantization=quantization)
        assert engine.describe().quantization == served


def test_a_model_in_blocks_sleeps_and_wakes_with_the_same_bits(load, tmp_path, native_cache):
    stored(LLAMA, tmp_path, ("Q4_0", "Q8_0"))
    options = {"native": native_cache, "standby": StandbyModels(1)}
    asked = [ask(prompt, max_tokens=8, **GREEDY, logprobs=0) for prompt in prompts_of(3)]

    def answers(engine):
        outputs = read(engine.submit(asked))
        return [[(o.token_id, o.score) for o in outputs[index]] for index in sorted(outputs)]

    first = load(tmp_path, **options)
    before, model = answers(first), innermost(first.runner).model
    first.close()
    again = load(tmp_path, **options)
    assert innermost(again.runner).model is model
    assert answers(again) == before


def test_plans_of_an_earlier_load_are_used(load, tmp_path, native_cache):
    stored(LLAMA, tmp_path / "model", ("Q4_0",))
    options = {"native": native_cache, "plans": tmp_path / "plans", "stamp": "one"}
    prompt = prompts_of(6)[5]
    first = first_logprob(load(tmp_path / "model", **options), prompt)
    (plan,) = (tmp_path / "plans").glob("*.plan")
    written = plan.read_bytes()
    assert first_logprob(load(tmp_path / "model", **options), prompt) == first
    assert plan.read_bytes() == written


def test_a_parameter_that_the_file_lacks_is_named(load, tmp_path, native_cache):
    stored(LLAMA, tmp_path)
    table = json.loads((tmp_path / "weights.json").read_text())
    del table["tensors"]["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "weights.json").write_text(json.dumps(table))
    for options in ({}, {"native": native_cache}):
        with pytest.raises(ModelLoadFailed, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            load(tmp_path, **options)


def test_weights_of_another_shape_are_refused(load, tmp_path, native_cache):
    stored(LLAMA, tmp_path)
    table = json.loads((tmp_path / "weights.json").read_text())
    other = copy.deepcopy(table)
    part = other["tensors"]["model.layers.0.mlp.up_proj.weight"]["parts"][0]
    part["shape"] = [part["shape"][0] // 2, part["shape"][1]]
    (tmp_path / "weights.json").write_text(json.dumps(other))
    for options in ({}, {"native": native_cache}):
        with pytest.raises(ModelLoadFailed):
            load(tmp_path, **options)


PEAK = r"""
import re, sys, threading
from pathlib import Path
import torch
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.thread import EngineThread

def peak():
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's, if larger
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

folder, native, quantization, *store = sys.argv[1:]
packed = None
thread = EngineThread()
thread.call(lambda: torch.ones(512, 512) @ torch.ones(512, 512)).result()
if store:
    from transformers_api.engine.native.packed_store import PackedStore
    from transformers_api.engine.native.packed_weights import PackedFile
    packed = PackedFile(PackedStore(Path(store[0]), 1 << 30), "0" * 32, "model")
before = peak()
options = LoadOptions(
    packed=packed,
    native=None if native == "-" else Path(native),
    quantization=quantization,
    kv_cache_bytes=1 << 20,
    num_slots=1,
)
engine = thread.call(lambda: load_engine(Path(folder), options, thread)).result()
for writer in threading.enumerate():
    if writer.name == "packed writer":
        writer.join()
print(engine.describe().bytes, peak() - before)
engine.close()
thread.stop()
"""


@pytest.mark.slow
def test_a_load_takes_little_more_memory_than_the_packed_weights(tmp_path, native_cache):
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    stored(tf.LlamaConfig(**SIZES | wide), tmp_path, ("Q4_0",))  # 176 million weights
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(native_cache), "gguf"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert child.returncode == 0, child.stderr
    packed, taken = map(int, child.stdout.split())
    assert packed > 100 << 20
    assert taken < 1.1 * packed + (150 << 20)  # 700 MB of numbers would be too much

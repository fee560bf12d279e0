"""What a load finds out about a model, and what is then served: nothing that differs from it."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from tests.engine.models import BATCHED, IDS, SIZES, generate, tiny_model
from tests.engine.reading import GREEDY, ask, complete, read
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.pretrained import context_window
from transformers_api.engine.runners.packed_linear import PackedLinear
from transformers_api.engine.runners.verify import windows_agree
from transformers_api.errors import ModelNotServable


@pytest.fixture(params=["native", "torch"])
def native_default(request):
    """Every engine here, on the kernels and without them."""
    return request.getfixturevalue("native_cache") if request.param == "native" else None


def moshi(window):
    torch.manual_seed(0)
    config = tf.MoshiConfig(**SIZES, **IDS, ffn_dim=64, head_dim=8, sliding_window=window)
    return tf.MoshiForCausalLM(config).eval()


@pytest.mark.parametrize("window", [8, 16, 100])
def test_a_window_that_the_model_does_not_apply_is_not_applied(make_engine, window):
    model = moshi(window)
    assert not windows_agree(model)
    engine = make_engine(model)
    assert engine.describe().kernels == "torch"
    prompt = torch.arange(10, 50).tolist()
    assert complete(engine, ask(prompt, max_tokens=8, **GREEDY)) == [generate(model, prompt, 8)]
    assert model.config.sliding_window == window


@pytest.mark.parametrize("name", ["mistral-window-8", "gemma2", "gpt-oss-sinks", "llama"])
def test_windows_that_the_model_applies_are_found_right(name):
    assert windows_agree(tiny_model(name))


def longcat():
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(
        tf.LongcatFlashConfig(
            vocab_size=97,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            kv_lora_rank=16,
            q_lora_rank=16,
            ffn_hidden_size=48,
            expert_ffn_hidden_size=32,
            n_routed_experts=4,
            zero_expert_num=2,
            moe_topk=2,
            max_position_embeddings=128,
            **IDS,
        )
    ).eval()


def test_a_layer_whose_weight_alone_is_used_keeps_it(make_engine):
    model = longcat()
    engine = make_engine(model, native=None)
    assert engine.describe().mode == "batching"
    assert any(isinstance(module, PackedLinear) for module in engine.model.modules())
    prompt = [5, 6, 7, 8]
    assert complete(engine, ask(prompt, max_tokens=8, **GREEDY)) == [generate(model, prompt, 8)]


@pytest.mark.parametrize("kind", [tf.FalconH1Config, tf.BambaConfig])
def test_models_that_keep_the_last_logits_score_whole_prompts(make_engine, kind):
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    more = {"mamba_d_ssm": 64} if kind is tf.FalconH1Config else {"attn_layer_indices": [1]}
    config = kind(**SIZES, **IDS, **sizes, **more, mamba_chunk_size=8)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.arange(10, 30).tolist()
    for new in (0, 2):
        outputs = read(
            make_engine(model).submit(
                [ask(prompt, max_tokens=new, prompt_logprobs=0, logprobs=0, **GREEDY)]
            )
        )[0]
        with torch.inference_mode():
            own = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        scores = outputs[0].prompt_scores[1:]
        assert [score.token_id for score in scores] == prompt[1:]
        for place, score in enumerate(scores):
            assert score.logprob == pytest.approx(float(own[place, score.token_id]), abs=1e-3)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (tf.BertConfig(**{**SIZES, "num_hidden_layers": 1}), "later tokens"),
        (tf.BertConfig(**SIZES), r'later tokens \(config.json has no "is_decoder": true\)'),
        (
            tf.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=64),
            "later tokens",
        ),
    ],
)
def test_a_model_that_reads_in_both_directions_is_refused_with_the_reason(
    make_engine, config, says
):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # as they are made, tokens hardly notice each other
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape) * 1.3 / parameter.shape[-1] ** 0.5)
    with pytest.raises(ModelNotServable, match=says) as caught:
        make_engine(model)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (tf.RobertaConfig(**SIZES, pad_token_id=1), 126),
        (tf.XLMRobertaConfig(**SIZES, pad_token_id=5), 122),
        (tf.MPNetConfig(**SIZES, pad_token_id=1), 126),
        (tf.BertConfig(**SIZES), 128),
        (BATCHED["opt"](), 128),
    ],
)
def test_positions_behind_the_padding_are_not_part_of_the_window(config, tokens):
    model = tf.AutoModel.from_config(config).eval()
    assert context_window(model, LoadOptions()) == tokens
    assert context_window(model, LoadOptions(max_context_tokens=7)) == 7
    with torch.inference_mode():
        model(input_ids=torch.full((1, tokens), 9))

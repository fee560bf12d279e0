"""GET /inspect/model and POST /inspect/*, by fakes to the letter."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from PIL import Image

from tests.api.test_fuzz import anything, places, replaced
from tests.fake_inspection import (
    HEADS,
    WIDTH,
    FakeInspector,
    fake_anatomy,
    fake_layer,
    matrix,
    sliced,
)
from tests.fakes import FakeEngine, fake_model, fake_spec, say
from tests.repeats import slow
from transformers_api.api.http.services import EXTENSION
from transformers_api.errors import ModelLoadFailed
from transformers_api.inspection.base import AttentionMode, AttentionWindow, HeadGrid, Routing
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.limits.token_bucket import Rate

HELLO = {"messages": [{"role": "user", "content": "hé"}]}
IDS = [256, *b"user\nh\xc3\xa9", 257, 10, 256, *b"assistant\n"]
SHOWN = ["<|im_start|>", *"user\nh��", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"]
UNSEEN = {6: "h", 7: "\\xc3", 8: "\\xa9"}
DISPLAYED = [UNSEEN.get(i, text.replace("\n", "\\x0a")) for i, text in enumerate(SHOWN)]
N = len(IDS)
ATTENTION = {**HELLO, "trace_layer": 1, "head": 2}
POSTED = ("full_attn", "rollout", "tokens", "heads", "logit_lens", "attribution", "hidden_states")
BODIES = {
    "full_attn": {**ATTENTION, "rows": [0, 5], "cols": [0, 5], "downsample": [3, 3]},
    "rollout": {"token_ids": [65, 66, 67], "format": "u8", "reduce": "mean"},
    "tokens": {"prompt": "abc", "logprobs": True, "topk": 2, "model": "fake"},
    "heads": {**HELLO, "thumb": 2},
    "logit_lens": {**HELLO, "layers": [-1, 1], "positions": [-1, 0], "topk": 2, "target": 5},
    "attribution": {**HELLO, "target_token_id": 65, "target_position": -2, "steps": 8},
    "hidden_states": {**HELLO, "layers": [0], "positions": "all", "format": "json"},
}


def ask(served, route, body, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return served.client.post(f"/inspect/{route}", json=body, headers=names)


def answer(served, route, body, **headers):
    response = ask(served, route, body, **headers)
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()


def refusal(served, route, body, **headers):
    response = ask(served, route, body, **headers)
    return response.status_code, response.get_json()


@pytest.fixture
def looking(serve):
    """Make an application whose default model has this inspector; settings as in ``serve``."""

    def build(inspector=None, engine=None, **settings):
        served = serve(engine, **settings)
        fields = {"inspector": inspector or FakeInspector()}
        served.loader.build = lambda spec: fake_model(spec, served.engines[spec.name], **fields)
        return served

    return build


def with_services(served, **fields):
    served.app.extensions[EXTENSION] = replace(served.app.extensions[EXTENSION], **fields)
    return served


# /inspect/full_attn


def test_full_attention_has_the_documented_fields(served):
    found = answer(served, "full_attn", ATTENTION)
    assert numpy.allclose(found.pop("attn"), matrix(1, HEADS, N)[2], atol=1e-5)
    assert found == {
        "layer": 1,
        "head": 2,
        "tokens": SHOWN,
        "tokens_display": DISPLAYED,
        "token_ids": IDS,
        "rows": [0, N],
        "cols": [0, N],
        "n": N,
        "kv_head": 1,
        "layer_type": "full_attention",
        "window": None,
        "state": "exact",
        "verified": True,
        "sink": None,
    }


def test_numbers_have_five_decimals_and_rows_sum_to_one(served):
    response = ask(served, "full_attn", ATTENTION)
    assert not re.search(r"\d\.\d{6}", response.get_data(as_text=True))
    rows = response.get_json()["attn"]
    assert all(abs(sum(row) - 1) < 5e-6 * N for row in rows)
    assert all(weight == 0 for i, row in enumerate(rows) for weight in row[i + 1 :])


@pytest.mark.parametrize(("head", "kv_head"), [(0, 0), (1, 0), (3, 1), ("mean", None)])
def test_the_head_of_keys_and_values_is_named(served, head, kv_head):
    assert answer(served, "full_attn", {**ATTENTION, "head": head})["kv_head"] == kv_head


@pytest.mark.parametrize("how", ["mean", "max"])
def test_heads_can_be_reduced_to_one_matrix(served, how):
    found = answer(served, "full_attn", {**ATTENTION, "head": how})["attn"]
    assert numpy.allclose(found, getattr(matrix(1, HEADS, N), how)(axis=0), atol=1e-5)


def test_a_window_of_rows_and_columns(served):
    found = answer(served, "full_attn", {**ATTENTION, "rows": [4, 9], "cols": [2, 5]})
    assert numpy.allclose(found["attn"], matrix(1, HEADS, N)[2, 4:9, 2:5], atol=1e-5)
    assert (found["rows"], found["cols"], found["n"]) == ([4, 9], [2, 5], N)


def test_a_matrix_is_made_smaller_on_the_server(served):
    full = matrix(1, HEADS, N)[2]
    for how in ("max", "mean"):
        found = answer(served, "full_attn", {**ATTENTION, "downsample": [2, 40], "reduce": how})
        half = N // 2
        expected = [getattr(part, how)(axis=0) for part in (full[:half], full[half:])]
        assert numpy.allclose(found["attn"], expected, atol=1e-5)


def test_half_precision_and_bytes_hold_the_same_numbers(served):
    full = matrix(1, HEADS, N)[2]
    half = answer(served, "full_attn", {**ATTENTION, "format": "f16"})["attn"]
    assert {key: half[key] for key in ("dtype", "shape", "order", "encoding")} == {
        "dtype": "float16",
        "shape": [N, N],
        "order": "C",
        "encoding": "base64",
    }
    read = numpy.frombuffer(base64.b64decode(half["data"]), "<f2").reshape(N, N)
    assert numpy.allclose(read, full, atol=1e-3)
    small = answer(served, "full_attn", {**ATTENTION, "format": "u8"})["attn"]
    read = numpy.frombuffer(base64.b64decode(small["data"]), "u1").reshape(N, N)
    assert numpy.allclose(read / 255 * numpy.array(small["scale"])[:, None], full, atol=2e-3)


def test_all_heads_come_in_binary_formats_only(served):
    body = {**ATTENTION, "head": "all"}
    found = answer(served, "full_attn", {**body, "format": "f16"})
    assert (found["head"], found["kv_head"]) == ("all", None)
    assert found["attn"]["shape"] == [HEADS, N, N]
    said = 'head "all" cannot be sent as {}; use format "f16" or "u8", or Accept: application/x-npz'
    assert refusal(served, "full_attn", body) == (422, {"detail": said.format("json")})
    asked = refusal(served, "full_attn", body, Accept="image/png")
    assert asked == (422, {"detail": said.format("png")})


def test_a_file_for_numpy(served):
    response = ask(served, "full_attn", {**ATTENTION, "head": "all"}, Accept="application/x-npz")
    assert (response.status_code, response.content_type) == (200, "application/x-npz")
    file = numpy.load(io.BytesIO(response.get_data()))
    assert (file["attn"].dtype, file["token_ids"].dtype) == (numpy.float16, numpy.int32)
    assert numpy.allclose(file["attn"], matrix(1, HEADS, N), atol=1e-3)
    assert file["token_ids"].tolist() == IDS
    meta = json.loads(file["meta"].tobytes())
    assert (meta["layer"], meta["n"], meta["state"]) == (1, N, "exact")


def test_a_picture(served):
    def grey(**fields):
        response = ask(served, "full_attn", ATTENTION | fields, Accept="image/png")
        assert response.content_type == "image/png"
        return numpy.asarray(Image.open(io.BytesIO(response.get_data())))

    cells = grey(cell=1, labels=False)
    assert numpy.allclose(cells / 255, numpy.sqrt(matrix(1, HEADS, N)[2]), atol=0.01)
    assert grey(cell=3).shape == (3 * N, 3 * N)  # no room for words
    assert min(grey(labels=False).shape) >= 512
    assert min(grey().shape) > min(grey(labels=False).shape)
    pooled = grey(downsample=[2, 2], cell=10)
    assert pooled.shape == (20, 20)  # a cell is of several tokens: no words
    for cell in (0, 65):
        refused = refusal(served, "full_attn", ATTENTION | {"cell": cell})
        assert refused == (422, {"detail": "cell must be an integer from 1 to 64"})


def test_what_is_accepted_decides(served):
    for accepted, kind in {
        "*/*": "application/json",
        "text/html,application/xhtml+xml,*/*;q=0.8": "text/html; charset=utf-8",
        "application/xml": "application/json",
        "image/*": "image/png",
        "application/json;q=0.5, application/x-npz": "application/x-npz",
    }.items():
        assert ask(served, "full_attn", ATTENTION, Accept=accepted).content_type == kind
    assert ask(served, "full_attn", ATTENTION).content_type == "application/json"


def test_a_sink_is_never_dropped(looking):
    class Sinks(FakeInspector):
        def attention(self, ids, layer, heads, rows, cols):
            job = super().attention(ids, layer, heads, rows, cols)

            def with_sink(model):
                window = yield from job(model)
                sink = numpy.full(window.weights.shape[:2], 0.25, numpy.float32)
                return AttentionWindow(weights=window.weights * 0.75, sink=sink)

            return with_sink

    served = looking(Sinks())
    found = answer(served, "full_attn", {**ATTENTION, "rows": [0, 3]})
    assert found["sink"] == [0.25] * 3
    assert numpy.allclose(numpy.sum(found["attn"], axis=1) + found["sink"], 1, atol=1e-4)
    found = answer(served, "full_attn", {**ATTENTION, "head": "all", "format": "u8"})
    assert numpy.shape(found["sink"]) == (HEADS, N)
    assert answer(served, "full_attn", {**ATTENTION, "downsample": [2, 2]})["sink"] == [0.25] * 2


# What is written first


def test_tokens_are_generated_first_and_shown_too(looking):
    served = looking(engine=FakeEngine(say("yes")))
    found = answer(served, "full_attn", {**ATTENTION, "max_new_tokens": 8})
    assert found["token_ids"] == [*IDS, *b"yes", 258]  # what ended it is a token too
    assert numpy.shape(found["attn"]) == (N + 4, N + 4)


def test_by_default_the_likeliest_tokens_are_generated(served):
    answer(served, "full_attn", {**ATTENTION, "max_new_tokens": 3})
    params = served.params()
    assert (params.max_tokens, params.temperature, params.seed) == (3, 0.0, 42)
    assert params.stop_token_ids == {257}
    options = {"seed": 7, "temperature": 1.5, "top_k": 5, "top_p": 0.9}
    answer(served, "full_attn", {**ATTENTION, "max_new_tokens": 3, **options})
    params = served.params()
    assert (params.seed, params.temperature, params.top_k, params.top_p) == (7, 1.5, 5, 0.9)


def test_without_new_tokens_nothing_is_generated(served):
    answer(served, "full_attn", ATTENTION)
    assert served.engine.submitted == []


def test_more_new_tokens_than_fit_are_refused_before_any_is_generated(looking):
    served = looking(engine=FakeEngine(max_model_len=30), inspect_max_tokens=40)
    status, said = refusal(served, "full_attn", {**ATTENTION, "max_new_tokens": 10})
    assert (status, said["code"]) == (422, "context_length_exceeded")
    status, said = refusal(served, "full_attn", {**ATTENTION, "max_new_tokens": 20})
    error = f"Prompt too large to inspect: {N + 20} tokens (max 40)"
    assert (status, said) == (413, {"error": error, "code": "prompt_too_large"})
    assert served.engine.submitted == []


# What is looked at


def test_a_text_token_ids_and_messages_may_be_looked_at(served):
    assert answer(served, "tokens", {"prompt": "hé"})["token_ids"] == [*b"h\xc3\xa9"]
    assert answer(served, "tokens", {"token_ids": [0, 258]})["token_ids"] == [0, 258]
    assert answer(served, "tokens", HELLO)["token_ids"] == IDS


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "there is none"),
        ({"prompt": "a", "token_ids": [1]}, "there is prompt and token_ids"),
        ({**HELLO, "completion_id": "x"}, "there is messages and completion_id"),
    ],
)
@pytest.mark.parametrize("route", POSTED)
def test_exactly_one_thing_is_looked_at(served, route, body, said):
    needed = {"trace_layer": 0, "head": 0}
    expected = f"give exactly one of messages, prompt, token_ids, completion_id; {said}"
    assert refusal(served, route, {**needed, **body}) == (422, {"detail": expected})


@pytest.mark.parametrize("empty", [{"messages": []}, {"prompt": ""}, {"token_ids": []}])
def test_it_must_not_be_empty(served, empty):
    (name,) = empty
    assert refusal(served, "tokens", empty) == (422, {"detail": f"{name} must not be empty"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_exact_tokens_of_a_completion_can_be_looked_at(looking, chat, stream):
    served = looking(engine=FakeEngine(say("yes")))
    kind = served.chat if chat else served.complete
    response = kind("Hi", stream=stream, max_tokens=9, n=2)
    text = response.get_data(as_text=True)
    response.close()
    name = re.search(r'"id":\s?"((?:chat)?cmpl-\w+)"', text)[1]
    prompt = answer(served, "tokens", {"prompt": "Hi"} if not chat else _said("Hi"))["token_ids"]
    for choice in (0, 1):
        body = {"completion_id": name, "choice": choice}
        assert answer(served, "tokens", body)["token_ids"] == [*prompt, *b"yes", 258]
    assert refusal(served, "tokens", {"completion_id": name, "choice": 2}) == (
        422,
        {"detail": "choice must be in [0, 1]"},
    )


def _said(content):
    return {"messages": [{"role": "user", "content": content}]}


def test_a_completion_is_looked_at_in_the_model_that_wrote_it(served):
    wrote = served.complete("Hi", model="owner/second").get_json()["id"]
    served.complete("Hi", model="fake")
    assert served.swapper.status().model == "fake"
    answer(served, "tokens", {"completion_id": wrote, "model": "two"})  # an alias
    assert served.swapper.status().model == "owner/second"
    answer(served, "tokens", {"completion_id": wrote})
    status, said = refusal(served, "tokens", {"completion_id": wrote, "model": "fake"})
    assert (status, said) == (422, {"detail": "completion_id is of model 'owner/second'"})


def test_an_unknown_completion_is_404_and_loads_nothing(served):
    status, said = refusal(served, "tokens", {"completion_id": "cmpl-1"})
    assert (status, said["code"]) == (404, "unknown_completion")
    assert served.loader.calls == []


def test_messages_to_a_model_without_chat_are_refused_before_it_is_loaded(serve):
    served = serve(specs=(fake_spec("base", chat="off"),))
    status, said = refusal(served, "tokens", {**HELLO, "model": "base"})
    assert (status, said["code"]) == (501, "chat_completions_not_available")
    assert served.loader.calls == []
    assert ask(served, "tokens", {"prompt": "Hi", "model": "base"}).status_code == 200


def test_an_unknown_model_is_404(served):
    assert refusal(served, "tokens", {**HELLO, "model": "nobody"}) == (
        404,
        {"error": "Model 'nobody' not found", "code": "model_not_found"},
    )


def test_a_window_that_moves_on_shows_the_end_that_the_model_sees(looking):
    engine = FakeEngine(max_model_len=10)
    engine.context_overflow = "slide"
    found = answer(looking(engine=engine), "full_attn", ATTENTION)
    assert (found["token_ids"], found["state"], found["n"]) == (IDS[-10:], "truncated", 10)


def test_more_than_the_context_is_refused(looking):
    status, said = refusal(looking(engine=FakeEngine(max_model_len=10)), "tokens", HELLO)
    assert (status, said["code"]) == (422, "context_length_exceeded")


# Whether one may, and how much


@pytest.mark.parametrize("route", POSTED)
def test_too_much_text_is_counted_as_the_model_reads_it(served, route):
    body = {"trace_layer": 0, "head": 0, **_said("x" * 17_000)}
    frame = len("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    error = f"Prompt too large: {17_000 + frame} bytes (max 16384)"
    assert refusal(served, route, body) == (413, {"error": error, "code": "prompt_too_large"})


def test_a_text_is_counted_too(served):
    error = "Prompt too large: 17000 bytes (max 16384)"
    status, said = refusal(served, "tokens", {"prompt": "x" * 17_000})
    assert (status, said["error"]) == (413, error)


def test_the_bytes_of_a_prompt_can_be_set(looking):
    served = looking(max_prompt_bytes=10)
    assert refusal(served, "tokens", {"prompt": "x" * 11})[0] == 413
    assert ask(served, "tokens", {"prompt": "x" * 10}).status_code == 200


def test_too_many_tokens_are_refused(looking):
    status, said = refusal(looking(), "tokens", {"token_ids": [65] * 5000})
    error = "Prompt too large to inspect: 5000 tokens (max 2048)"
    assert (status, said) == (413, {"error": error, "code": "prompt_too_large"})


def test_attribution_reads_fewer_tokens(looking):
    served = looking(attribution_max_tokens=20)
    error = f"Prompt too large to inspect: {N} tokens (max 20)"
    assert refusal(served, "attribution", HELLO)[1]["error"] == error
    assert ask(served, "tokens", HELLO).status_code == 200


def test_too_many_numbers_are_refused_with_ways_out(looking):
    served = looking(inspect_max_json_cells=400, inspect_max_cells=1000)
    body = {**ATTENTION, "token_ids": [65] * 30}
    del body["messages"]
    error = (
        '900 cells as json (max 400); ask for rows/cols, format "f16" or Accept: application/x-npz'
    )
    expected = {"error": error, "code": "response_too_large"}
    assert refusal(served, "full_attn", body) == (413, expected)
    for smaller in ({"rows": [0, 10]}, {"downsample": [20, 20]}, {"format": "f16"}):
        assert ask(served, "full_attn", {**body, **smaller}).status_code == 200
    assert ask(served, "full_attn", body, Accept="image/png").status_code == 200
    status, said = refusal(served, "full_attn", {**body, "head": "all", "format": "u8"})
    assert (status, said["code"]) == (413, "response_too_large")
    assert said["error"] == "3600 cells (max 1000); ask for rows/cols or for less"


def test_the_limits_hold_for_every_route(looking):
    served = looking(inspect_max_cells=40)
    for route, fields in {
        "rollout": {"format": "f16"},
        "heads": {"thumb": 3},
        "hidden_states": {"layers": "all", "positions": "all"},
    }.items():
        status, said = refusal(served, route, {**HELLO, **fields})
        assert (status, said["code"]) == (413, "response_too_large"), route
    status, said = refusal(looking(), "logit_lens", {"token_ids": [65] * 2000, "positions": "all"})
    assert (status, said["error"]) == (
        413,
        "3 layers x 2000 positions are 6000 cells (max 4096); ask for fewer layers or positions",
    )
    body = {
        "token_ids": [65] * 2000,
        "positions": "all",
        "format": "json",
        "layers": [-1, 0, 1, 1, 1],
    }
    status, said = refusal(served, "hidden_states", body)
    assert (status, said["error"]) == (
        413,
        '80000 numbers as json (max 65536); ask for fewer layers or positions, or format "npz"',
    )


def test_one_window_of_the_whole_rollout_is_limited_by_the_whole(looking):
    served = looking(inspect_max_cells=200)
    assert refusal(served, "rollout", {**HELLO, "rows": [0, 2]})[0] == 413


@pytest.mark.parametrize(
    ("route", "fields", "said"),
    [
        ("full_attn", {"trace_layer": 2}, "trace_layer must be in [0, 1]"),
        ("full_attn", {"trace_layer": -1}, "trace_layer must be in [0, 1]"),
        ("full_attn", {"trace_layer": 2**62}, "trace_layer must be in [0, 1]"),
        ("full_attn", {"trace_layer": "1"}, "trace_layer must be an integer"),
        ("full_attn", {"trace_layer": None}, "trace_layer is required"),
        ("full_attn", {"head": 4}, "head must be in [0, 3]"),
        ("full_attn", {"head": -1}, "head must be in [0, 3]"),
        ("full_attn", {"head": "min"}, 'head must be an integer, "mean", "max" or "all"'),
        ("full_attn", {"head": True}, 'head must be an integer, "mean", "max" or "all"'),
        ("full_attn", {"head": [1]}, 'head must be an integer, "mean", "max" or "all"'),
        ("full_attn", {"head": None}, "head is required"),
        (
            "full_attn",
            {"rows": [3, 3]},
            f"rows must be [start, stop] with 0 <= start < stop <= {N}",
        ),
        (
            "full_attn",
            {"cols": [0, 99]},
            f"cols must be [start, stop] with 0 <= start < stop <= {N}",
        ),
        ("full_attn", {"rows": [1]}, "rows must have from 2 to 2 items"),
        ("full_attn", {"reduce": "sum"}, "reduce must be one of 'max', 'mean'"),
        (
            "full_attn",
            {"max_new_tokens": -1},
            "max_new_tokens must be an integer from 0 to 16 777 216",
        ),
        ("logit_lens", {"layers": [2]}, "layers must be in [-1, 1]"),
        ("logit_lens", {"layers": "some"}, 'layers must be "all" or a list of integers'),
        ("logit_lens", {"positions": [N]}, f"positions must be in [-{N}, {N - 1}]"),
        ("logit_lens", {"target": 259}, "target must be in [0, 258]"),
        ("logit_lens", {"target": "best"}, 'target must be "sampled" or a token id'),
        ("attribution", {"steps": 129}, "steps must be in [1, 128]"),
        ("attribution", {"steps": 0}, "steps must be in [1, 128]"),
        ("attribution", {"steps": "some"}, 'steps must be "auto" or an integer'),
        ("attribution", {"positions": [N]}, f"positions must be in [-{N}, {N - 1}]"),
        (
            "rollout",
            {"layers": [1, 0]},
            "layers must be [first, last] with 0 <= first <= last <= 1",
        ),
        ("attribution", {"target_position": -N - 1}, f"target_position must be in [-{N}, {N - 1}]"),
        ("attribution", {"target_token_id": 259}, "target_token_id must be in [0, 258]"),
        ("hidden_states", {"layers": [-2]}, "layers must be in [-1, 1]"),
        ("hidden_states", {"stream": "mlp"}, "stream must be one of 'residual'"),
        ("tokens", {"topk": 21}, "topk must be an integer from 0 to 20"),
        ("heads", {"thumb": 65}, "thumb must be an integer from 0 to 64"),
    ],
)
def test_what_is_out_of_range_is_named(served, route, fields, said):
    body = {**(ATTENTION if route == "full_attn" else HELLO), **fields}
    assert refusal(served, route, body) == (422, {"detail": said})


def test_ids_beyond_the_vocabulary_are_refused(served):
    status, said = refusal(served, "tokens", {"token_ids": [1, 259]})
    assert status == 422
    assert "token id 259" in said["detail"]


def test_switched_off_it_is_403_for_every_route(serve):
    served = serve(inspect_enabled=False)
    off = {"error": "Inspection is disabled on this server", "code": "inspect_disabled"}
    for route in POSTED:
        assert refusal(served, route, BODIES[route]) == (403, off)
    response = served.client.get("/inspect/model")
    assert (response.status_code, response.get_json()) == (403, off)
    assert served.loader.calls == []


def test_a_body_that_is_wrong_comes_before_everything_else_and_costs_nothing(serve):
    served = serve(inspect_enabled=False, rates={"requests": Rate(1, 1)})
    for _ in range(3):
        assert refusal(served, "tokens", {"prompt": 5})[0] == 422
    assert refusal(served, "tokens", {"prompt": "x"})[0] == 403


def test_too_often_is_429_but_to_ask_what_can_be_asked_is_free(serve):
    served = serve(rates={"requests": Rate(2, 1)})
    for _ in range(4):
        assert served.client.get("/inspect/model").status_code == 200
    assert ask(served, "tokens", HELLO).status_code == 200
    assert ask(served, "heads", HELLO).status_code == 200
    response = ask(served, "tokens", {"prompt": "x" * 17_000})  # before the size
    assert (response.status_code, response.get_json()) == (
        429,
        {"error": "Rate limit exceeded", "code": "rate_limited"},
    )
    assert int(response.headers["Retry-After"]) > 1


def test_one_more_than_may_wait_is_429(looking):
    hold, begun = threading.Event(), threading.Event()

    class Slow(FakeInspector):
        def rollout(self, ids, layers, drop_first):
            def work():
                begun.set()
                assert hold.wait(20)
                return matrix(0, 1, len(ids))[0]

            return sliced(work)

    served = with_services(looking(Slow()), inspections=Inspections(0, 20))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.app.test_client().post, "/inspect/rollout", json=HELLO)
        assert begun.wait(30)
        response = ask(served, "heads", HELLO)
        hold.set()
        assert running.result(30).status_code == 200
    assert (response.status_code, response.get_json()["code"]) == (429, "inspect_busy")
    assert response.headers["Retry-After"] == "1"
    assert served.swapper.status().leases == 0


def test_what_takes_too_long_is_504(served):
    with_services(served, inspections=Inspections(4, 0.0))
    assert refusal(served, "rollout", HELLO) == (
        504,
        {"error": "The inspection took longer than 0 s", "code": "inspect_timeout"},
    )


def test_a_model_that_cannot_be_loaded_is_503(served):
    served.loader.fail["load"] = ModelLoadFailed("no weights")
    status, said = refusal(served, "tokens", HELLO)
    assert (status, said["code"]) == (503, "model_load_failed")


def test_a_model_that_nobody_can_look_into_is_refused(serve):
    served = serve()
    served.loader.build = lambda spec: fake_model(spec, FakeEngine(), inspector=None)
    said = {"detail": "Model 'fake' cannot be inspected", "code": "model_not_capable"}
    assert refusal(served, "tokens", HELLO) == (422, said)
    response = served.client.get("/inspect/model")
    assert (response.status_code, response.get_json()) == (422, said)


# Models of other kinds


def hybrid():
    layers = (
        fake_layer(0, type="linear_attention", heads=0, kv_heads=0, available=False),
        fake_layer(1, type="sliding_attention", window=8, sinks=True),
    )
    return FakeInspector(fake_anatomy(attention=layers))


def test_a_layer_without_attention_is_refused_and_the_others_are_named(looking):
    served = looking(hybrid())
    said = "layer 0 is linear_attention and has no attention weights; layers with attention: [1]"
    expected = (422, {"detail": said, "code": "attention_unavailable"})
    assert refusal(served, "full_attn", {**ATTENTION, "trace_layer": 0}) == expected
    found = answer(served, "full_attn", ATTENTION)
    assert (found["layer_type"], found["window"]) == ("sliding_attention", 8)
    status, said = refusal(served, "rollout", HELLO)
    assert (status, said["code"]) == (422, "attention_unavailable")
    assert "layers without attention: [0]" in said["detail"]


def test_layers_without_attention_stand_in_the_grid_with_the_reason(looking):
    without, attention = answer(looking(hybrid()), "heads", HELLO)["layers"]
    assert without == {
        "layer": 0,
        "type": "linear_attention",
        "heads": None,
        "reason": "linear_attention",
    }
    assert len(attention["heads"]) == HEADS


@pytest.mark.parametrize("route", ["full_attn", "heads", "rollout"])
def test_a_model_without_attention_is_refused(looking, route):
    layers = tuple(fake_layer(i, type="mamba", available=False) for i in range(2))
    anatomy = fake_anatomy(model_type="mamba", mode=AttentionMode.NONE, attention=layers)
    said = {
        "detail": "model type mamba has no attention weights",
        "code": "attention_unavailable",
    }
    served = looking(FakeInspector(anatomy))
    assert refusal(served, route, BODIES[route]) == (422, said)
    assert ask(served, "logit_lens", HELLO).status_code == 200


def test_a_model_without_a_lens_is_refused(looking):
    served = looking(FakeInspector(fake_anatomy(lens=False, lens_is_exact=False)))
    status, said = refusal(served, "logit_lens", HELLO)
    assert (status, said["code"]) == (422, "model_not_capable")


# The other questions


def test_tokens_show_where_they_stand_and_who_said_them(served):
    found = answer(served, "tokens", HELLO)
    text = b"".join(map(bytes, found["bytes"])).decode()
    assert text == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    for display, (start, end) in zip(found["tokens"], found["offsets"], strict=True):
        assert text[start:end] == display or display == "�"
    assert found["offsets"][7:9] == [[18, 19], [19, 19]]  # é begins in the first of two
    assert found["spans"] == [{"role": "user", "start": 6, "end": 9, "section": "content"}]
    assert "surprisal" not in found
    assert answer(served, "tokens", {"prompt": "hé"})["spans"] == []


def test_tokens_show_how_the_model_foresaw_them(served):
    found = answer(served, "tokens", {"prompt": "abc", "logprobs": True, "topk": 2})
    assert found["surprisal"] == [None, 0.5, 0.5]
    assert found["entropy"] == [None, 1.5, 1.5]
    assert found["rank"] == [None, 0, 0]
    assert found["topk"] == [
        None,
        [
            {"token_id": 98, "token": "b", "logprob": -0.5},
            {"token_id": 99, "token": "c", "logprob": -1.5},
        ],
        [
            {"token_id": 99, "token": "c", "logprob": -0.5},
            {"token_id": 100, "token": "d", "logprob": -1.5},
        ],
    ]


def test_the_grid_of_heads(served):
    found = answer(served, "heads", {**HELLO, "thumb": 3})
    assert found["n"] == N
    assert found["layers"][1]["heads"][3] == {
        "head": 3,
        "entropy": 1.2,
        "distance": 4.1,
        "first": 0.6,
        "previous": 0.02,
        "self": 0.1,
        "sink": None,
    }
    assert (found["thumb"]["dtype"], found["thumb"]["shape"]) == ("uint8", [2, HEADS, 3, 3])
    assert "thumb" not in answer(served, "heads", HELLO)


def test_the_lens_has_a_row_for_each_position_and_a_cell_for_each_layer(served):
    found = answer(served, "logit_lens", {**HELLO, "positions": [0, -1], "topk": 1})
    assert (found["layers"], found["positions"]) == ([-1, 0, 1], [0, N - 1])
    assert (found["final_norm"], found["exact_final"]) == ("model.norm", True)
    assert [len(row) for row in found["cells"]] == [3, 3]
    assert found["cells"][1][2] == {
        "topk": [{"token_id": 97, "token": "a", "prob": 0.3}],
        "entropy": 2.1,
        "target_rank": 5,
        "target_prob": 0.01,
    }
    assert found["targets"] == [{"token_id": 97, "token": "a"}] * 2
    assert answer(served, "logit_lens", {**HELLO, "target": 66})["targets"][0]["token"] == "B"


def test_attribution_scores_every_token_up_to_the_query(served):
    found = answer(served, "attribution", {**HELLO, "target_position": 2})
    assert found == {
        "method": "occlusion",
        "unit": "nats",
        "target": {"token_id": 97, "token": "a", "logprob": -0.25, "position": 2},
        "value": -0.25,
        "scores": [-1.0, 0.0, 1.0],
        "convergence_delta": None,
        "steps": None,
        "largest_change": None,
        "note": None,
    }
    body = {**HELLO, "method": "integrated_gradients", "of": "logit", "target_token_id": 66}
    found = answer(served, "attribution", body)
    assert (found["convergence_delta"], found["unit"], found["value"]) == (0.01, "logits", 7.5)
    assert found["target"]["token"] == "B"


def asked_of(looking, **body):
    questions = []

    class Noting(FakeInspector):
        def attribute(self, ids, question):
            questions.append(question)
            return super().attribute(ids, question)

    answer(looking(Noting()), "attribution", {**HELLO, **body})
    return questions[0]


def test_a_path_begins_at_line_breaks_unless_another_beginning_is_asked_for(looking):
    question = asked_of(looking, method="integrated_gradients")
    assert (question.baseline, question.baseline_token_id, question.steps) == ("token", 10, None)
    question = asked_of(looking, baseline="zero", steps=64)
    assert (question.baseline, question.steps) == ("zero", 64)


def test_words_and_some_positions_can_be_taken_away(looking):
    body = {"messages": None, "prompt": "The cat, it"}
    assert asked_of(looking, **body).groups is None
    assert asked_of(looking, **body, positions=[-1, 0]).groups == ((0,), (10,))
    words = asked_of(looking, **body, group="word", screen=2)
    assert words.groups == ((0, 1, 2), (3, 4, 5, 6), (7,), (8, 9, 10))
    assert words.screen == 2
    some = asked_of(looking, **body, group="word", positions=[4, 7])
    assert some.groups == ((3, 4, 5, 6), (7,))


def test_the_rollout_is_a_matrix_like_any_other(served):
    found = answer(served, "rollout", {**HELLO, "rows": [1, 4]})
    assert numpy.allclose(found.pop("attn"), matrix(0, 1, N)[0, 1:4], atol=1e-5)
    assert (found["layers"], found["rows"], found["n"], found["verified"]) == (
        [0, 1],
        [1, 4],
        N,
        True,
    )
    assert "leftmost" in found["note"]
    response = ask(served, "rollout", HELLO, Accept="application/x-npz")
    assert numpy.load(io.BytesIO(response.get_data()))["attn"].shape == (N, N)
    assert ask(served, "rollout", HELLO, Accept="text/html").content_type.startswith("text/html")


def test_hidden_states_are_a_file_unless_asked_otherwise(served):
    response = ask(served, "hidden_states", {**HELLO, "layers": [-1, 1], "positions": "all"})
    file = numpy.load(io.BytesIO(response.get_data()))
    assert (file["states"].shape, file["states"].dtype) == ((2, N, WIDTH), numpy.float32)
    meta = json.loads(file["meta"].tobytes())
    assert (meta["layers"], meta["note"]) == ([-1, 1], "before the final norm")
    found = answer(served, "hidden_states", {**HELLO, "layers": [0], "format": "json"})
    assert found["states"] == [[list(map(float, range(WIDTH)))]]
    assert (found["layers"], found["positions"], found["stream"]) == ([0], [N - 1], "residual")


# GET /inspect/model


def test_the_model_says_what_can_be_asked(looking):
    routing = Routing(layers=(1,), experts=8, experts_per_token=2)
    served = looking(FakeInspector(fake_anatomy(routing=routing), gradients=False))
    found = served.client.get("/inspect/model").get_json()
    assert {name: found[name] for name in ("id", "layers", "heads", "kv_heads", "vocab")} == {
        "id": "fake",
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 259,
    }
    attention = found["attention"]
    assert (attention["mode"], attention["impl"], attention["verified"]) == ("tap", "sdpa", True)
    assert attention["per_layer"][0] == {
        "layer": 0,
        "type": "full_attention",
        "heads": 4,
        "kv_heads": 2,
        "window": None,
        "sinks": False,
        "available": True,
        "reason": None,
        "max_rel_err": 1e-7,
    }
    assert found["lens"] == {"available": True, "final_norm": "model.norm", "exact": True}
    assert found["gradients"] is False
    assert found["router"] == {"layers": [1], "experts": 8, "experts_per_token": 2}
    assert (found["limits"]["max_tokens"], found["limits"]["max_json_cells"]) == (2048, 262144)
    assert found["formats"] == ["json", "f16", "u8", "topk", "npz", "png", "html"]


def test_without_a_name_it_tells_of_the_model_in_memory_and_switches_nothing(served):
    served.complete("Hi", model="owner/second")
    assert served.client.get("/inspect/model").get_json()["id"] == "owner/second"
    assert served.client.get("/inspect/model?model=fake").get_json()["id"] == "fake"
    assert served.client.get("/inspect/model?model=nobody").status_code == 404


def test_without_loading_a_model_that_is_not_in_memory_says_so_and_no_more(served):
    client = served.client
    for query in ("load=false", "load=0", "model=fake&load=false", "model=two&load=False"):
        found = client.get(f"/inspect/model?{query}").get_json()
        assert set(found) == {"id", "loaded", "limits", "formats"}
        assert found["loaded"] is False
    assert found["id"] == "owner/second"
    assert served.loader.calls == []
    served.complete("Hi", model="owner/second")
    for query in ("load=false", "model=two&load=false", "model=two", "load=true"):
        found = client.get(f"/inspect/model?{query}").get_json()
        assert (found["id"], found["loaded"], found["layers"]) == ("owner/second", True, 2)
    assert client.get("/inspect/model?model=fake&load=false").get_json()["loaded"] is False
    assert served.loader.count("load") == 1
    assert client.get("/inspect/model?model=nobody&load=false").status_code == 404
    wrong = client.get("/inspect/model?load=maybe")
    assert (wrong.status_code, wrong.get_json()) == (422, {"detail": "load must be true or false"})


class Reading(FakeInspector):
    """Its layers read so much of "France" and of the first token; notes what was asked."""

    def __init__(self, *read, **anatomy):
        layers = tuple(fake_layer(i, available=w is not None) for i, w in enumerate(read))
        super().__init__(fake_anatomy(layers=len(read), attention=layers, **anatomy))
        self.read = read

    def heads(self, ids, thumb):
        self.asked.append(("heads", list(ids)))
        n, place = len(ids), bytes(i if i < 256 else 0 for i in ids).rfind(b"France")
        thumbs = numpy.full((len(self.read), HEADS, n, n), numpy.nan, numpy.float32)
        for layer, weights in enumerate(self.read):
            if weights is not None:
                thumbs[layer] = 0
                thumbs[layer, :, -1, place + 2], thumbs[layer, :, -1, 0] = weights
        numbers = numpy.zeros((len(self.read), HEADS), numpy.float32)
        names = ("entropy", "distance", "first", "previous", "itself")
        grid = HeadGrid(**dict.fromkeys(names, numbers), sink=None, thumbs=thumbs)
        return sliced(lambda: grid)


@pytest.mark.parametrize(
    ("read", "layer"),
    [
        ([(0.1, 0), (0.4, 0), (0.2, 0)], 1),
        ([(0.3, 0.1), (0.25, 0.7), (0.01, 0.99)], 1),  # of what does not rest, 83 %
        ([None, (0.1, 0), None, (0.2, 0)], 3),
        ([(0.0, 1.0), (0.0, 0.5)], 0),
        ([None, None], None),
    ],
)
def test_the_layer_that_is_suggested_reads_the_word_in_question(looking, read, layer):
    inspector = Reading(*read)
    served = looking(inspector)
    for _ in range(3):
        assert served.client.get("/inspect/model").get_json()["suggested_layer"] == layer
    looks = [kind for kind, _ in inspector.asked if kind == "heads"]
    assert len(looks) == (layer is not None)  # once for a loaded model


def test_a_model_that_cannot_read_the_question_is_suggested_a_later_layer(serve):
    inspector = Reading(*[(0.5, 0)] * 8)
    served = serve(FakeEngine(max_model_len=12))
    served.loader.build = lambda spec: fake_model(spec, served.engine, inspector=inspector)
    assert served.client.get("/inspect/model").get_json()["suggested_layer"] == 6
    assert "heads" not in dict(inspector.asked)


# The page


def page(served, text, **fields):
    body = {"prompt": text, "trace_layer": 0, "head": 0, **fields}
    response = ask(served, "full_attn", body, Accept="text/html")
    assert response.status_code == 200
    return response


def data_of(html):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1]
    )


def test_a_page_holds_everything_itself(served):
    response = page(served, "abc")
    html = response.get_data(as_text=True)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", html)
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert f'content="{policy}"' in html
    for element in ("script", "style"):
        text = re.search(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    data = data_of(html)
    assert (data["tokens"], data["model"], data["attn"]["dtype"]) == ([*"abc"], "fake", "uint8")


def test_all_heads_fit_in_a_page(served):
    data = data_of(page(served, "abc", head="all").get_data(as_text=True))
    assert data["attn"]["shape"] == [HEADS, 3, 3]


def test_no_text_gets_out_of_its_place_in_the_page(looking):
    tokens = ["</script><script>alert(1)</script>", "<!--", "\u2028&lt;%DATA%%POLICY%"]
    served = looking()
    tokenizer = fake_model(fake_spec()).tokenizer
    tokenizer.add_tokens(tokens)
    first = len(tokenizer) - len(tokens)
    engine = FakeEngine(vocab_size=len(tokenizer))
    served.loader.build = lambda spec: fake_model(
        spec, engine, inspector=FakeInspector(), tokenizer=tokenizer
    )
    body = {"token_ids": [*range(first, len(tokenizer))], "trace_layer": 0, "head": 0}
    html = ask(served, "full_attn", body, Accept="text/html").get_data(as_text=True)
    assert html.count("<script") == html.count("</script>") == 2
    assert "<!--" not in html.split("<script type", 1)[1]
    assert data_of(html)["tokens"] == tokens


# Whatever comes


@pytest.mark.parametrize("examples", [120, *slow(400)])
def test_no_body_makes_the_server_fail(served, examples):
    seen = set()

    @st.composite
    def mutated(draw):
        route = draw(st.sampled_from(POSTED))
        body = BODIES[route]
        for _ in range(draw(st.integers(1, 2))):
            body = replaced(body, draw(st.sampled_from(list(places(body)))), draw(anything))
        return route, body

    accepted = st.sampled_from(["*/*", "application/x-npz", "image/png", "text/html", "x"])

    @hypothesis(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(mutated(), accepted)
    def check(request, kind):
        route, body = request
        response = ask(served, route, body, Accept=kind)
        seen.add(response.status_code)
        assert response.status_code in (200, 404, 413, 422), (request, response.get_data())
        if response.status_code != 200:
            said = response.get_json()
            assert said.keys() <= {"detail", "error", "code"}
            assert said.get("detail") or said.get("error")

    check()
    assert {200, 422} <= seen
    assert served.swapper.status().leases == 0


@pytest.mark.parametrize("route", POSTED)
def test_the_examples_of_the_documentation_page_are_answered(served, route):
    document = served.client.get("/openapi.json").get_json()
    content = document["paths"][f"/inspect/{route}"]["post"]["requestBody"]["content"]
    example = content["application/json"]["example"]
    assert ask(served, route, example).status_code == 200

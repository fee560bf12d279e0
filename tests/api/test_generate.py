"""The native API: /generate, /generate/stream, /models, /load_model."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings

from tests.api.conftest import events
from tests.api.test_fuzz import anything, places, replaced
from tests.fakes import FakeEngine, fake_spec, say
from tests.model_folders import TENSORS, model_files, write_files
from transformers_api.errors import EngineFailed, ModelLoadFailed
from transformers_api.serving.models.spec import PathSource

END = "<|endoftext|>"


def generate(served, prompt="Once", url="/generate", **fields):
    return served.client.post(url, json={"prompt": prompt, **fields})


def answer(served, prompt="Once", **fields):
    response = generate(served, prompt, **fields)
    assert response.status_code == 200, response.get_data(as_text=True)
    assert served.swapper.status().leases == 0
    return response.get_json()


def streamed(served, prompt="Once", **fields):
    return events(generate(served, prompt, "/generate/stream", **fields))


def detail(response, status=400):
    assert response.status_code == status, response.get_data(as_text=True)
    body = response.get_json()
    assert set(body) == {"detail"}
    return body["detail"]


def wait_for(served, name, state):
    deadline = time.monotonic() + 30
    while (shown := served.client.get(f"/models/{name}").get_json())["state"] != state:
        assert time.monotonic() < deadline, shown
        time.sleep(0.005)  # polling, with a deadline
    return shown


def test_the_defaults_are_those_of_the_document(served):
    body = answer(served)
    params = served.params()
    assert body["parameters"] == {
        "max_new_tokens": 100,
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.95,
        "word_repetition_penalty": 1.0,
    }
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (
        100,
        0.7,
        50,
        0.95,
    )
    assert (params.word_repetition_penalty, params.repetition_penalty) == (1.0, 1.0)
    assert params.seed is None


def test_every_field_reaches_the_engine_and_the_answer(served):
    asked = {
        "max_new_tokens": 7,
        "temperature": 0,
        "top_k": 0,
        "top_p": 0.5,
        "word_repetition_penalty": 1.5,
        "seed": 3,
        "stop": ["zzz"],
    }
    assert answer(served, **asked)["parameters"] == asked
    params = served.params()
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (7, 0, 0, 0.5)
    assert (params.word_repetition_penalty, params.seed) == (1.5, 3)


def test_the_text_begins_with_the_prompt_unless_that_is_not_wanted(serve):
    served = serve(FakeEngine(say(" upon a time")))
    assert answer(served)["generated_text"] == "Once upon a time"
    assert answer(served, return_full_text=False)["generated_text"] == " upon a time"
    assert answer(served)["prompt"] == "Once"


def test_the_end_token_is_not_counted(serve):
    served = serve(FakeEngine(say("abc")))
    body = answer(served)
    assert (body["tokens_generated"], body["finish_reason"]) == (3, "stop")
    body = answer(served, max_new_tokens=2)
    assert (body["tokens_generated"], body["finish_reason"]) == (2, "length")


def test_the_model_is_named_as_it_was_asked_for(served):
    assert (answer(served)["model_used"], answer(served)["model"]) == ("fake", "fake")
    body = answer(served, model="two")
    assert (body["model_used"], body["model"]) == ("two", "two")


def test_max_length_is_the_other_name_of_max_new_tokens_which_wins(served):
    assert answer(served, max_length=4)["tokens_generated"] == 4
    assert answer(served, max_length=4, max_new_tokens=6)["tokens_generated"] == 6


def test_a_list_of_prompts_runs_together_and_gives_lists(serve):
    served = serve(FakeEngine(lambda prompt, *_: [*prompt, *prompt]))
    body = answer(served, ["ab", "xyz"], max_new_tokens=5)
    assert body["prompt"] == ["ab", "xyz"]
    assert body["generated_text"] == ["ababab", "xyzxyzxy"]
    assert body["tokens_generated"] == [4, 5]
    assert body["finish_reason"] == ["stop", "length"]
    assert body["timings"]["prompt_tokens"] == 5
    assert [len(submit) for submit in served.engine.submitted] == [2]


def test_a_list_of_one_gives_lists_too(serve):
    body = answer(serve(FakeEngine(say("!"))), ["Hi"])
    assert (body["prompt"], body["generated_text"]) == (["Hi"], ["Hi!"])
    assert isinstance(body["generation_time"], float)


def test_the_times_add_up(serve):
    served = serve(FakeEngine(say("ab"), gate=threading.Semaphore(3)))  # a thread of its own
    body = answer(served)
    timings = body["timings"]
    assert set(timings) == {
        "encode_ms",
        "time_to_first_token_ms",
        "generation_ms",
        "decode_ms",
        "total_ms",
        "avg_ms_per_token",
        "prompt_tokens",
    }
    assert 0 < timings["time_to_first_token_ms"] <= timings["generation_ms"]
    assert timings["total_ms"] >= timings["encode_ms"] + timings["generation_ms"]
    assert timings["avg_ms_per_token"] == pytest.approx(timings["generation_ms"] / 2, abs=0.01)
    assert body["generation_time"] == pytest.approx(timings["generation_ms"] / 1000, abs=0.001)
    assert body["tokens_per_second"] == pytest.approx(2000 / timings["generation_ms"], rel=0.02)


def test_a_model_that_says_nothing_is_no_error(serve):
    body = answer(serve(FakeEngine(say(""))))
    assert (body["generated_text"], body["tokens_generated"]) == ("Once", 0)
    assert body["timings"]["avg_ms_per_token"] == 0
    assert body["tokens_per_second"] == 0


def test_a_stop_string_ends_the_text_before_it(serve):
    served = serve(FakeEngine(say("one two three")))
    assert answer(served, stop=" three")["generated_text"] == "Onceone two"
    assert answer(served, stop=["x", " two"])["generated_text"] == "Onceone"


@pytest.mark.parametrize("stop", [END, [END]])
def test_the_end_that_a_model_spells_out_ends_its_text_beside_other_stops(serve, stop):
    spec = fake_spec(generation={"stop": stop})
    served = serve(FakeEngine(say(f"A tale.{END}More")), specs=(spec,))
    body = answer(served)
    assert (body["generated_text"], body["finish_reason"]) == ("OnceA tale.", "stop")
    assert answer(served, stop="tale")["generated_text"] == "OnceA "
    assert answer(served, stop="zzz")["generated_text"] == "OnceA tale."
    pieces = streamed(served).payloads[:-1]
    assert "".join(piece["text"] for piece in pieces) == "A tale."


def test_the_registry_may_have_other_defaults(serve):
    spec = fake_spec(generation={"temperature": 0.1, "top_k": -1, "max_tokens": 5})
    served = serve(specs=(spec,))
    assert answer(served)["parameters"] == {
        "max_new_tokens": 5,
        "temperature": 0.1,
        "top_k": 0,
        "top_p": 0.95,
        "word_repetition_penalty": 1.0,
    }
    assert answer(served, temperature=0.2, max_new_tokens=6)["tokens_generated"] == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", 5),
        ("prompt", {"text": "x"}),
        ("prompt[1]", ["a", ""]),
        ("prompt[0]", [[1, 2]]),
        ("model", ""),
        ("max_new_tokens", 0),
        ("max_new_tokens", "5"),
        ("max_new_tokens", 2.0),
        ("max_length", -1),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", True),
        ("top_k", -1),
        ("top_p", 1.5),
        ("word_repetition_penalty", 0.05),
        ("word_repetition_penalty", 2.5),
        ("return_full_text", "no"),
        ("seed", 1.5),
        ("stop", [""]),
    ],
)
@pytest.mark.parametrize("url", ["/generate", "/generate/stream"])
def test_a_bad_field_is_400_and_named(served, url, field, value):
    body = {"prompt": "Hi", field.partition("[")[0]: value}
    assert field in detail(served.client.post(url, json=body))
    assert served.loader.count("load") == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}"])
def test_a_body_that_is_no_request_is_400(served, body):
    assert detail(served.client.post("/generate", data=body))


@pytest.mark.parametrize("url", ["/generate", "/generate/stream"])
def test_an_unknown_model_is_404_and_evicts_nothing(served, url):
    answer(served)
    assert detail(generate(served, url=url, model="invalid-model"), 404) == (
        "Model 'invalid-model' not found"
    )
    assert served.swapper.status().model == "fake"


@pytest.mark.parametrize("url", ["/generate", "/generate/stream"])
def test_without_auto_load_a_model_that_is_not_loaded_is_503(serve, url):
    served = serve(auto_load=False)
    assert detail(generate(served, url=url), 503) == "Model 'fake' is not loaded"
    assert served.client.post("/models/fake/load").status_code == 200
    wait_for(served, "fake", "loaded")
    assert answer(served)["tokens_generated"]


def test_prompts_have_a_limit_in_bytes_and_in_number(serve):
    served = serve(max_prompt_bytes=10, max_inflight=2, max_queue=1)
    assert "prompt" in detail(generate(served, ["sixsix", "sixsix"]), 413)
    assert "4 prompts" in detail(generate(served, ["a"] * 4))


def test_what_does_not_fit_the_context_is_400_and_a_default_is_cut(serve):
    served = serve(FakeEngine(max_model_len=20))
    assert "20 tokens" in detail(generate(served, "x" * 20))
    assert "max_new_tokens" not in detail(generate(served, "x" * 30))
    assert "18 in the completion" in detail(generate(served, "xxx", max_new_tokens=18))
    assert answer(served, "xxx")["parameters"]["max_new_tokens"] == 17
    assert answer(served, ["xxx", "xxxxx"])["parameters"]["max_new_tokens"] == 15


@pytest.mark.parametrize("overflow", ["slide", "crop"])
@pytest.mark.parametrize(("window", "most"), [(20, 500), (1024, 1024)])
def test_a_model_whose_window_moves_takes_longer_prompts(serve, overflow, window, most):
    class Moving(FakeEngine):
        def _check(self, request):
            pass

    engine = Moving(max_model_len=window)
    engine.context_overflow = overflow
    served = serve(engine)
    assert answer(served, "x" * 2000, max_new_tokens=most)["tokens_generated"] > 10
    assert answer(served)["parameters"]["max_new_tokens"] == 100
    for name in ("max_new_tokens", "max_length"):
        refused = detail(generate(served, **{name: most + 1}))
        assert refused == f"'{name}' must be at most {most} for this model"


def test_a_stream_has_the_pieces_and_ends_in_the_whole_answer(serve):
    served = serve(FakeEngine(say(" upon")))
    response = generate(served, url="/generate/stream", seed=1)
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    read = events(response)
    *pieces, last = read.payloads
    assert [piece["index"] for piece in pieces] == [0] * 5
    assert "".join(piece["text"] for piece in pieces) == " upon"
    assert last.pop("done") is True
    assert last["generated_text"] == "Once upon"
    whole = answer(served, seed=1)
    assert set(last) == set(whole)
    assert last["parameters"] == whole["parameters"]
    assert read.done
    assert served.swapper.status().leases == 0


def test_generate_streams_when_the_body_says_so(serve):
    served = serve()
    pieces = streamed(served).payloads[:-1]
    asked = events(generate(served, stream=True))
    assert asked.payloads[:-1] == pieces
    assert asked.done


def test_several_answers_to_one_prompt_are_refused_by_name(serve):
    served = serve()
    assert generate(served, n=1).status_code == 200
    assert "n" in detail(generate(served, n=4))


def test_a_streamed_character_is_never_cut(serve):
    served = serve(FakeEngine(say("é😀")))
    *pieces, last = streamed(served).payloads
    assert [piece["text"] for piece in pieces] == ["é", "😀"]
    assert last["generated_text"] == "Onceé😀"


def test_a_streamed_batch_says_which_prompt_each_piece_continues(serve):
    served = serve(FakeEngine(lambda prompt, *_: prompt))
    *pieces, last = streamed(served, ["ab", "xyz"]).payloads
    for index, text in enumerate(["ab", "xyz"]):
        assert "".join(p["text"] for p in pieces if p["index"] == index) == text
    assert last["generated_text"] == ["abab", "xyzxyz"]
    assert last["tokens_generated"] == [2, 3]


def test_an_error_in_a_stream_is_an_event_with_a_detail_and_no_done(serve):
    served = serve(FakeEngine(say("Hello"), error=EngineFailed("The step failed"), error_after=2))
    read = streamed(served)
    assert read.payloads[-1] == {"detail": "The step failed"}
    assert not read.done
    assert detail(generate(served), 500) == "The step failed"
    assert served.swapper.status().leases == 0


def test_a_quiet_stream_shows_signs_of_life(serve):
    gate = threading.Event()
    served = serve(FakeEngine(say("late"), gate=gate))
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    read = streamed(served)
    assert read.pings
    assert read.payloads[-1]["generated_text"] == "Oncelate"


def test_a_stream_that_is_left_ends_its_sequences(serve):
    gate = threading.Semaphore(2)
    served = serve(FakeEngine(say("endless" * 50), gate=gate))
    response = generate(served, url="/generate/stream")
    next(response.iter_encoded())
    response.close()
    assert served.engine.aborted
    assert served.swapper.status().leases == 0


def test_models_are_listed_with_what_the_registry_says_of_them(serve):
    known = {"description": "A model", "parameter_count": "51M", "config": {"n_layer": 8}}
    served = serve(specs=(fake_spec("tiny", metadata=known),))
    answer(served)
    listed = served.client.get("/models").get_json()
    assert {model["name"]: model["loaded"] for model in listed} == {
        "fake": True,
        "owner/second": False,
        "tiny": False,
    }
    assert listed[-1] == {
        "name": "tiny",
        "description": "A model",
        "parameters": "51M",
        "loaded": False,
        "config": {"n_layer": 8},
    }
    assert listed[0]["parameters"] is None


def test_a_models_shape_is_read_from_its_files_where_the_registry_is_silent(serve, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 16,
        "hidden_size": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "prompt_window": None,
        "n_experts": 0,
        "top_experts": 2,
    }
    folder = write_files(tmp_path / "model", model_files(config, TENSORS))
    served = serve(specs=(fake_spec("mine", source=PathSource(folder)),))
    assert served.client.get("/models/mine").get_json()["config"] == {
        "vocab_size": 16,
        "block_size": 64,
        "n_embd": 4,
        "n_head": 2,
        "n_layer": 1,
    }


def test_a_model_from_outside_the_registry_is_listed_while_it_is_loaded(serve, monkeypatch):
    served = serve()
    spec = fake_spec("hub/model", registered=False)
    served.engines["hub/model"] = FakeEngine()
    resolve = served.services.registry.resolve
    monkeypatch.setattr(
        served.services.registry,
        "resolve",
        lambda name: spec if name == spec.name else resolve(name),
    )
    answer(served, model="hub/model")
    assert "hub/model" in [model["name"] for model in served.client.get("/models").get_json()]
    answer(served)
    assert "hub/model" not in [model["name"] for model in served.client.get("/models").get_json()]


@pytest.mark.parametrize("name", ["fake", "owner/second", "owner%2Fsecond"])
def test_loading_goes_on_in_the_background_and_can_be_polled(served, name):
    shown_name = name.replace("%2F", "/")
    hold = served.loader.hold["load"] = threading.Event()
    before = served.client.get(f"/models/{name}").get_json()
    assert (before["state"], before["progress"]) == ("not_loaded", 0)
    begun = served.client.post(f"/models/{name}/load")
    assert begun.get_json() == {"message": f"Loading model '{shown_name}' in background"}
    assert served.loader.entered["load"].acquire(timeout=30)
    during = served.client.get(f"/models/{name}").get_json()
    assert (during["state"], during["loaded"], during["error"]) == ("loading", False, None)
    assert during["progress_text"] == "loading"
    hold.set()
    after = wait_for(served, name, "loaded")
    assert (after["name"], after["loaded"], after["progress"]) == (shown_name, True, 1)
    again = served.client.post(f"/models/{name}/load").get_json()
    assert again == {"message": f"Model '{shown_name}' is already loaded"}
    assert served.loader.count("load") == 1


def test_a_load_that_fails_says_why_until_the_next_one_begins(served):
    served.loader.fail["prepare"] = ModelLoadFailed("No such files")
    served.client.post("/models/fake/load")
    failed = wait_for(served, "fake", "failed")
    assert (failed["error"], failed["loaded"], failed["progress"]) == ("No such files", False, 0)
    assert served.client.get("/models/owner/second").get_json()["state"] == "not_loaded"
    del served.loader.fail["prepare"]
    served.client.post("/models/fake/load")
    assert wait_for(served, "fake", "loaded")["error"] is None


def test_a_model_that_waits_its_turn_is_loading_too(served):
    served.loader.hold["load", "fake"] = threading.Event()
    served.client.post("/models/fake/load")
    assert served.loader.entered["load"].acquire(timeout=30)
    served.client.post("/models/two/load")
    assert served.client.get("/models/two").get_json()["state"] == "loading"
    served.loader.hold["load", "fake"].set()
    wait_for(served, "two", "loaded")
    assert served.client.get("/models/fake").get_json()["state"] == "not_loaded"


@pytest.mark.parametrize("method", ["DELETE", "POST"])
@pytest.mark.parametrize("name", ["fake", "owner/second"])
def test_a_model_is_unloaded_once(served, method, name):
    served.swapper.load(name)
    url = f"/models/{name}/unload"
    done = served.client.open(url, method=method)
    assert done.get_json() == {"message": f"Model '{name}' unloaded successfully"}
    assert served.swapper.status().model is None
    assert detail(served.client.open(url, method=method), 404) == f"Model '{name}' is not loaded"


@pytest.mark.parametrize(
    ("method", "url", "text"),
    [
        ("GET", "/models/nope", "Model 'nope' not found"),
        ("POST", "/models/nope/load", "Model 'nope' not found"),
        ("POST", "/models/no/such/load", "Model 'no/such' not found"),
        ("DELETE", "/models/nope/unload", "Model 'nope' is not loaded"),
    ],
)
def test_an_unknown_name_is_404(served, method, url, text):
    answer(served)
    assert detail(served.client.open(url, method=method), 404) == text
    assert served.swapper.status().model == "fake"


def test_load_model_answers_when_the_model_is_there(served):
    for name in ("fake", "owner/second", "owner/second"):
        done = served.client.post("/load_model", json={"model_name": name})
        assert done.get_json() == {
            "message": f"Model {name} loaded successfully",
            "model_name": name,
            "task": "text-generation",
        }
        assert served.swapper.status().model == name
    assert served.loader.count("load") == 2


def test_load_model_names_what_is_wrong(served):
    def load(**body):
        return served.client.post("/load_model", json=body)

    assert detail(load()) == "'model_name' is required"
    assert "task" in detail(load(model_name="fake", task="text2text-generation"))
    assert detail(load(model_name="no/such"), 404) == "Model 'no/such' not found"
    served.loader.fail["load"] = ModelLoadFailed("Broken")
    assert detail(load(model_name="fake"), 503) == "Broken"


@pytest.mark.parametrize("what", ["load", "unload"])
def test_a_web_page_from_elsewhere_loads_and_unloads_nothing(serve, what):
    friend = "http://localhost:3000"
    served = serve(cors_allow_origins=(friend,))
    if what == "unload":
        served.swapper.load("fake")

    def post(origin):
        return served.client.post(f"/models/fake/{what}", headers={"Origin": origin})

    before = served.swapper.status()
    for origin in ("http://elsewhere.example", "null", "http://localhost:3001"):
        assert "CORS_ALLOW_ORIGINS" in detail(post(origin))
    assert served.swapper.status() == before
    assert post(friend if what == "load" else "http://localhost").status_code == 200


@pytest.mark.parametrize("url", ["/generate", "/load_model", "/models/fake/load"])
def test_a_wrong_method_is_405_and_says_which_are_right(served, url):
    response = served.client.put(url)
    assert detail(response, 405)
    assert "POST" in response.headers["Allow"]


def test_an_answer_is_logged_with_its_speed(served, caplog):
    with caplog.at_level("INFO", "transformers_api"):
        answer(served, max_new_tokens=4)
    assert "fake: 4 tokens in " in caplog.text


def test_no_body_makes_the_server_fail(served):
    seen = set()
    start = {
        "prompt": ["Hi", "Ho"],
        "model": "fake",
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "word_repetition_penalty": 1.1,
        "return_full_text": False,
        "seed": 3,
        "stop": ["x"],
    }
    cases = [(url, path) for url in ("/generate", "/generate/stream") for path in places(start)]

    @settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(anything)
    def check(value):
        for url, path in cases:
            raw = json.dumps(replaced(start, path, value))
            response = served.client.post(url, data=raw, content_type="application/json")
            text = response.get_data(as_text=True)
            response.close()
            seen.add(response.status_code)
            assert response.status_code in (200, 400, 404), (raw, text)
            if response.status_code != 200:
                assert set(json.loads(text)) == {"detail"}

    check()
    assert {200, 400} <= seen
    assert served.swapper.status().leases == 0

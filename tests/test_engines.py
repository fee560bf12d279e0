"""Every engine behind the same API: what the protocol promises, and what passes between processes."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch  # noqa: F401 - a front would forbid its import in this process

from tests import tokenizers
from tests.api.conftest import events
from tests.api.test_tools import WEATHER
from tests.api.tiny_app import save
from tests.direct_transport import DirectTransport
from tests.redis_server import RedisServer, wait_for_redis
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.cluster import front
from transformers_api.cluster.messages import error_of, failure_of, place_of
from transformers_api.cluster.metrics_page import merged
from transformers_api.cluster.replica import Replica
from transformers_api.config.settings import SettingError, Settings
from transformers_api.engine.base import FinishReason, SamplingParams, SequenceRequest
from transformers_api.engines import ENGINES
from transformers_api.errors import (
    ContextLengthExceeded,
    EngineDead,
    InspectionDisabled,
    ModelNotCapable,
    ModelNotFound,
    ModelUnloaded,
    Overloaded,
)
from transformers_api.inspection import questions
from transformers_api.inspection.base import TracePlan
from transformers_api.serving.constraints.plan import plan_of
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.limits.cancellation import Cancellation

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPT = list(b"The colour of the sea")
YES_OR_NO = ConstraintSpec(kind="regex", source="yes|no", param="regex")
MESSAGES = [{"role": "user", "content": "Hi"}]
EDIT = {"do": "ablate", "part": "mlp", "layer": 1, "with": "mean"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    entries = [{"name": name, "path": str(folder / name)} for name in ("one", "two")]
    for entry in entries:
        save(folder / entry["name"], tokenizers.byte_level())
    entries[0]["embedding"] = {"pooling": "mean"}
    entries.append({"name": "far", "upstream": "http://127.0.0.1:9/v1"})
    (folder / "models.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    return Settings(
        model_registry_path=folder / "models.json",
        include_default_models=False,
        default_model="one",
        preload_model=False,
        model_store=folder / "store",
        hf_home=folder / "hub",
        torch_threads=1,
        rate_limit_per_min=0,
        max_inflight=4,
        max_queue=8,
        enable_embeddings_backend=True,
    )


def front_of(transport, settings):
    """A front's application that reaches its replicas by ``transport``."""
    engines = {**ENGINES, "ray": lambda parts: front.cluster_engine(parts, transport)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_api.app.ENGINES", engines)
        return create_app(replace(settings, engine="ray"))


@pytest.fixture(scope="module")
def cluster(settings):
    """A front with one replica, in this process."""
    published = []

    async def publish(model):
        published.append(model)

    replica = Replica(settings, "r1", publish)
    transport = DirectTransport(replica)
    app = front_of(transport, settings)
    yield SimpleNamespace(
        app=app,
        client=app.test_client(),
        services=app.extensions[EXTENSION],
        transport=transport,
        replica=replica,
        published=published,
    )
    replica._engine.models.close()


@pytest.fixture(scope="module")
def local(settings):
    app = create_app(settings)
    services = app.extensions[EXTENSION]
    yield SimpleNamespace(app=app, client=app.test_client(), services=services)
    services.swapper.close()


@pytest.fixture(params=["local", "ray"])
def side(request):
    return request.getfixturevalue({"local": "local", "ray": "cluster"}[request.param])


@pytest.fixture
def model(side):
    with side.services.swapper.lease(side.services.registry.resolve("one")) as lease:
        yield lease.model


def read(stream):
    return [output for output in stream.read(20) if output is not None]


# -- the protocol, of each engine


def test_it_describes_itself(model):
    facts = model.engine.describe()
    assert (facts.device, facts.mode) == ("cpu", "batching")
    assert facts.bytes > 1000
    assert model.engine.max_model_len == 4096
    assert model.engine.vocab_size > 258
    assert model.engine.eos_token_ids == {258}
    assert model.engine.context_overflow is None


def test_outputs_end_once_for_each_sequence(model):
    requests = [SequenceRequest(PROMPT, GREEDY), SequenceRequest(PROMPT[:5], GREEDY)]
    outputs = read(model.engine.submit(requests))
    for index in (0, 1):
        own = [output for output in outputs if output.index == index]
        assert [output.finish_reason for output in own] == [None] * 7 + [FinishReason.LENGTH]
        assert all(type(output.token_id) is int for output in own)


def test_both_write_the_same_tokens(local, cluster):
    written = []
    for side in (local, cluster):
        with side.services.swapper.lease(side.services.registry.resolve("one")) as lease:
            params = replace(GREEDY, logprobs=2, prompt_logprobs=1)
            outputs = read(lease.model.engine.submit([SequenceRequest(PROMPT, params)]))
            written.append([(o.token_id, o.score, o.prompt_scores) for o in outputs])
    assert written[0] == written[1]
    assert len(written[0][0][2]) == len(PROMPT)


def test_what_it_refuses_is_raised_by_submit(model):
    with pytest.raises(ContextLengthExceeded):
        model.engine.submit([SequenceRequest(PROMPT * 300, GREEDY)])


def test_an_aborted_stream_ends_in_the_engine(side, model):
    params = replace(GREEDY, max_tokens=4000)
    stream = model.engine.submit([SequenceRequest(PROMPT, params)])
    assert stream.get(20).token_id is not None
    stream.abort()
    wait_for(lambda: running(side) == 0)


def test_of_several_sequences_one_is_aborted_in_the_engine(side, model):
    params = replace(GREEDY, max_tokens=4000)
    stream = model.engine.submit([SequenceRequest(PROMPT, params)] * 2)
    wait_for(lambda: running(side) == 2)
    stream.abort(0)
    wait_for(lambda: running(side) == 1)
    assert any(output.index == 1 for output in (stream.get(20) for _ in range(200)) if output)
    stream.abort()
    wait_for(lambda: running(side) == 0)


def test_a_constraint_holds(model):
    constraint = model.compiler.compile(YES_OR_NO).start()
    outputs = read(model.engine.submit([SequenceRequest(PROMPT, GREEDY, constraint=constraint)]))
    text = bytes(o.token_id for o in outputs if o.token_id is not None and o.token_id < 256)
    assert text in (b"yes", b"no")


def test_notes_of_a_trace_come_with_their_tokens(model):
    plan = TracePlan(layers=(0,), topk=2, lens_layers=(1,), lens_topk=1)
    stream = model.engine.submit([SequenceRequest(PROMPT, GREEDY)], observe={"trace": plan})
    traces = [output.extras["trace"] for output in read(stream)]
    assert [trace.step for trace in traces] == list(range(8))
    assert traces[0].attention[0].weights.shape == (4, len(PROMPT))


def test_a_question_is_answered_in_plain_arrays(side, model):
    grid = side.services.inspections.ask(model, questions.HeadGrid(PROMPT, 4), Cancellation())
    assert grid.entropy.shape == (2, 4)
    assert grid.thumbs.shape == (2, 4, 4, 4)
    states = side.services.inspections.ask(
        model, questions.HiddenStates(PROMPT, [0], [1, 2]), Cancellation()
    )
    assert states.shape == (1, 2, 32)


def test_vectors_are_the_same(local, cluster):
    vectors = [
        side.client.post("/v1/embeddings", json={"model": "one", "input": ["a b", "c"]}).json
        for side in (local, cluster)
    ]
    assert vectors[0] == vectors[1]
    assert len(vectors[0]["data"][0]["embedding"]) == 32


def test_closing_it_does_no_harm_to_others(cluster):
    spec = cluster.services.registry.resolve("one")
    with cluster.services.swapper.lease(spec) as lease:
        lease.model.engine.close()
        assert len(read(lease.model.engine.submit([SequenceRequest(PROMPT, GREEDY)]))) == 8
        assert lease.model.engine.stats().mode == "batching"
        assert lease.model.engine.evict_adapter("none") is False


def test_an_upstreams_engine_refuses_what_needs_tokens(local):
    with local.app.test_request_context():
        model = local.services.upstreams.model(local.services.registry.resolve("far"))
    engine = model.engine
    assert (engine.describe().device, engine.stats().mode) == ("upstream", "upstream")
    for refused in (
        lambda: engine.submit([SequenceRequest(PROMPT, GREEDY)]),
        lambda: engine.call(lambda _: None),
        lambda: engine.adapted(None),
    ):
        with pytest.raises(ModelNotCapable, match="upstream") as caught:
            refused()
        assert caught.value.param == "model"
    assert engine.evict_adapter("x") is False
    engine.close()


# -- the API, of each engine


def chat(side, **fields):
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, **fields}
    return side.client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="text"),
        pytest.param({"logprobs": True, "top_logprobs": 2}, id="scores"),
        pytest.param({"n": 2, "seed": 3, "temperature": 1}, id="choices"),
        pytest.param(
            {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300}, id="calls"
        ),
        pytest.param({"response_format": {"type": "regex", "value": "a{3}"}}, id="form"),
        pytest.param({"trace": {"topk": 2, "layers": [1]}}, id="trace"),
        pytest.param({"stop": "zzz", "prompt_logprobs": 1}, id="prompt"),
        pytest.param({"intervene": {"edits": [EDIT]}}, id="edited"),
        pytest.param({"intervene": {"edits": [EDIT], "compare": "forced"}}, id="compared"),
        pytest.param({"intervene": {"edits": [{**EDIT, "layer": 9}]}}, id="no layer"),
        pytest.param({"max_tokens": 5000}, id="too long"),
        pytest.param({"response_format": {"type": "regex", "value": "("}}, id="no regex"),
        pytest.param({"model": "nobody's"}, id="unknown"),
    ],
)
def test_answers_are_those_of_the_local_engine(local, cluster, fields):
    answers = [chat(side, **fields) for side in (local, cluster)]
    bodies = [plain(answer.json) for answer in answers]
    assert bodies[0] == bodies[1]
    assert answers[0].status_code == answers[1].status_code


def plain(value):
    """Without what differs from answer to answer."""
    if isinstance(value, dict):
        ids = ("id", "created", "ms", "bytes", "cached_tokens")
        return {name: plain(part) for name, part in value.items() if name not in ids}
    return [plain(part) for part in value] if isinstance(value, list) else value


def test_streams_come_through(cluster):
    stream = events(chat(cluster, stream=True))
    assert stream.done
    assert stream.text() == chat(cluster).json["choices"][0]["message"]["content"]


def test_a_replica_that_dies_ends_its_streams_with_an_error(cluster):
    cluster.transport.dies_after = 2
    try:
        stream = events(chat(cluster, stream=True, max_tokens=2000, ignore_eos=True))
    finally:
        cluster.transport.dies_after = None
    assert not stream.done
    assert stream.payloads[-1]["error"]["code"] == "replica_failed"
    assert chat(cluster).status_code == 200


def test_a_client_that_leaves_ends_its_answer_in_the_replica(cluster):
    response = chat(cluster, stream=True, max_tokens=3000, ignore_eos=True)
    body = iter(response.response)
    next(body)
    next(body)
    response.close()
    wait_for(lambda: running(cluster) == 0)


def test_inside_is_shown_through_it(local, cluster):
    models = [side.client.get("/inspect/model?model=one").json for side in (local, cluster)]
    assert models[0]["layers"] == 2
    assert models[0] == models[1]
    body = {"model": "one", "prompt": "abc", "logprobs": True}
    assert len(cluster.client.post("/inspect/tokens", json=body).json["tokens"]) == 3


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("tokens", {"logprobs": True, "intervene": {"edits": [EDIT]}}),
        ("hidden_states", {"format": "json", "layers": [0], "positions": [1]}),
        ("logit_parts", {"by": "layer"}),
        ("logit_lens", {"topk": 2}),
        ("attribution", {"method": "gradient_norm"}),
    ],
)
def test_what_is_inside_is_the_same_from_afar(local, cluster, route, fields):
    body = {"model": "one", "prompt": "abcd", **fields}
    answers = [side.client.post(f"/inspect/{route}", json=body) for side in (local, cluster)]
    assert answers[0].status_code == 200, answers[0].text
    assert plain(answers[0].json) == plain(answers[1].json)


def test_a_front_looks_into_what_another_has_written(cluster, settings, tmp_path, monkeypatch):
    wait_for_redis(monkeypatch)
    redis = RedisServer(tmp_path)
    redis.start()
    shared = replace(settings, redis_url=redis.url)
    one, two = (front_of(cluster.transport, shared) for _ in range(2))
    try:
        body = {"model": "one", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
        answer = one.test_client().post("/v1/chat/completions", json=body).json
        question = {"model": "one", "completion_id": answer["id"]}
        there, here = (
            app.test_client().post("/inspect/tokens", json=question) for app in (two, one)
        )
        assert there.status_code == 200
        assert there.json == here.json
        unshared = cluster.client.post("/inspect/tokens", json=question)
        assert unshared.json["code"] == "unknown_completion"
    finally:
        for app in (one, two):
            app.extensions[EXTENSION].completions.close()
        redis.kill()


def test_a_model_that_is_asked_for_is_loaded_and_made_known(cluster):
    assert chat(cluster, model="two").status_code == 200
    assert cluster.published[-1].startswith("two@")
    status = cluster.client.get("/status").json
    assert status["engine"] == "ray"
    wait_for(lambda: replicas(cluster)[0]["model"] == "two")
    assert replicas(cluster)[0]["replica"] == "r1"
    models = {each["id"]: each for each in cluster.client.get("/v1/models").json["data"]}
    assert (models["two"]["loaded"], models["one"]["loaded"]) == (True, False)
    assert cluster.client.delete("/v1/models/two").json["deleted"] is True
    assert cluster.client.delete("/v1/models/two").status_code == 404
    loaded = cluster.client.post("/v1/models", json={"model": "one"}).json
    assert loaded["status"] == "loaded"


def replicas(cluster):
    return cluster.client.get("/status").json["replicas"]


def test_tokens_are_had_without_the_weights(cluster):
    answer = cluster.client.post("/tokenize", json={"model": "two", "prompt": "abc"}).json
    assert answer["count"] == 3


def test_a_model_that_has_changed_is_asked_for_again(cluster):
    spec = cluster.services.registry.resolve("one")
    with cluster.services.swapper.lease(spec) as lease:
        lease.model.engine._caller = replace(lease.model.engine._caller, stamp="another")
        with pytest.raises(ModelUnloaded, match="changed"):
            lease.model.engine.submit([SequenceRequest(PROMPT, GREEDY)])
    cluster.transport.calls.clear()
    assert chat(cluster, model="one").status_code == 200
    assert ("describe", place_of(spec)) in cluster.transport.calls


def test_fronts_of_two_registries_each_get_the_weights_that_theirs_names(
    cluster, settings, folder, tmp_path
):
    save(tmp_path / "next", tokenizers.byte_level(), num_hidden_layers=1)
    entries = json.loads((folder / "models.json").read_text())
    entries[0]["path"] = str(tmp_path / "next")
    (tmp_path / "models.json").write_text(json.dumps(entries))
    newer = replace(settings, model_registry_path=tmp_path / "models.json")
    client = front_of(cluster.transport, newer).test_client()

    def layers_of(client):
        return client.get("/inspect/model?model=one").json["layers"]

    assert [layers_of(each) for each in (cluster.client, client) * 2] == [2, 1, 2, 1]
    question = {"model": "one", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    texts = [
        each.post("/v1/chat/completions", json=question).json["choices"][0]["message"]["content"]
        for each in (cluster.client, client) * 2
    ]
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_a_front_that_lost_its_head_goes_once_it_has_neither_replicas_nor_requests(cluster):
    services = cluster.services
    wait_for(lambda: any(each.ready for each in services.swapper.replicas))
    assert services.fault() is None
    cluster.transport.lost = True
    try:
        assert services.fault() is None  # its replicas live
        cluster.transport.hung = {"r1"}
        wait_for(lambda: not any(each.ready for each in services.swapper.replicas))
        request = Cancellation()
        services.admission.enter(request)
        assert services.fault() is None
        services.admission.leave(request)
        assert "head was lost" in services.fault()
    finally:
        cluster.transport.lost, cluster.transport.hung = False, set()
        wait_for(lambda: services.swapper.replicas[0].ready)


def test_metrics_of_replicas_have_their_label(cluster):
    page = cluster.client.get("/metrics").text
    assert 'transformers_api_ready{replica="r1"} 1.0' in page
    assert 'vllm:generation_tokens_total{model_name="one",replica="r1"}' in page
    assert page.count("# TYPE vllm:generation_tokens_total counter") == 1


def test_pages_of_metrics_are_merged_by_name():
    own = b"# HELP a_total A.\n# TYPE a_total counter\na_total 1.0\n"
    page = merged(own, [("x", own), ("y", b"# HELP b B.\n# TYPE b gauge\nb 2.0\n")]).decode()
    samples = [line for line in page.splitlines() if not line.startswith("#")]
    assert samples == ["a_total 1.0", 'a_total{replica="x"} 1.0', 'b{replica="y"} 2.0']


def test_a_hung_engine_has_no_heartbeat(settings):
    replica = Replica(replace(settings, metrics_enabled=False), "r2")
    replica.check_health()
    hanging = threading.Event()
    replica._engine = replace(replica._engine, fault=lambda: "A step takes longer than 1 s")
    with pytest.raises(EngineDead, match="longer"):
        replica.check_health()
    hanging.set()
    replica._engine.models.close()


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", retry_after=7),
        InspectionDisabled(),
        ModelNotFound("x"),
        ContextLengthExceeded("long", param="messages"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_arrive_as_they_were(error):
    other = error_of(failure_of(error))
    assert type(other) is type(error)
    fields = ("message", "param", "retry_after", "status", "code")
    assert [getattr(other, name) for name in fields] == [getattr(error, name) for name in fields]


def test_a_defect_in_a_replica_shows_nothing_of_itself():
    assert "secret" not in error_of(failure_of(KeyError("secret"))).message


def test_plans_of_constraints_start_again_as_they_were(local):
    with local.services.swapper.lease(local.services.registry.resolve("one")) as lease:
        model = lease.model
        plan = plan_of(model.compiler.compile(YES_OR_NO).start(forbidden=[5]))
        assert plan.grammar == YES_OR_NO
        again = plan.start(model.compiler, model.vocabulary)
        assert (again.allowed() == model.compiler.compile(YES_OR_NO).start().allowed()).all()


def test_leaving_refuses_new_requests(settings):
    transport = DirectTransport()
    models = front.ClusterModels(transport, None)
    models.refuse()
    with pytest.raises(Exception, match="shutting down"):
        models.lease(None)


# -- ENGINE


def test_a_server_of_upstreams_alone_serves_nothing_else(settings):
    app = create_app(replace(settings, engine="openai", default_model="far"))
    client = app.test_client()
    assert [each["id"] for each in client.get("/v1/models").json["data"]] == ["far"]
    assert client.get("/readyz").status_code == 200
    answer = client.post("/v1/chat/completions", json={"model": "one", "messages": MESSAGES})
    assert answer.status_code == 404
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert (answer.status_code, answer.json["error"]["code"]) == (502, "upstream_failed")


def test_without_ray_the_start_ends_with_one_line(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("transformers_api.cluster.ray_runtime.set_for_ray", lambda **_: None)
    with pytest.raises(SettingError, match="pip install"):
        create_app(replace(settings, engine="ray"))


def test_a_wrong_engine_is_refused_with_those_there_are():
    with pytest.raises(SettingError, match="local, ray, openai"):
        Settings.from_env({"ENGINE": "vllm"})


@pytest.mark.parametrize("text", ["localhost", "host:0", ":5", "host:99999"])
def test_a_wrong_address_of_a_cluster_is_refused(text):
    with pytest.raises(SettingError, match="CLUSTER_ADDRESS"):
        Settings.from_env({"CLUSTER_ADDRESS": text})


def running(side):
    pool = side.replica._engine.models if hasattr(side, "replica") else side.services.swapper
    return pool.status().engine.running


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        threading.Event().wait(0.01)

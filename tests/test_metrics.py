"""/metrics: what moves when something happens, and that nothing a client sends becomes a label."""

from __future__ import annotations

import json
import random
import re
import string
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.fakes import FakeEngine, say
from tests.metrics_app import make_app, post, scrape, wait_for
from transformers_api.api.http.request_record import RequestRecord
from transformers_api.config.settings import Settings
from transformers_api.engine.native.installation import compilations
from transformers_api.errors import (
    ConstraintFailed,
    ConstraintsUnavailable,
    EngineFailed,
    ModelLoadFailed,
    NotFound,
    Overloaded,
)
from transformers_api.kernels.build import NativeUnavailable, build
from transformers_api.kernels.variants import of_machine
from transformers_api.metric_names import described
from transformers_api.metrics import OTHER, Metrics
from transformers_api.serving.limits.key_file import KeyFile
from transformers_api.tallies import Tally

DASHBOARD = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboard.json"
# What the dashboards that vLLM ships ask for.
OF_VLLM = [
    "vllm:e2e_request_latency_seconds",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_success_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
]
CHAT = "handler=/v1/chat/completions,method=POST"


def test_all_metrics_are_in_the_table_and_all_of_the_table_are_metrics(tmp_path):
    app, _ = make_app(tmp_path)
    text = app.test_client().get("/metrics").get_data(as_text=True)
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    told = {name: kind for name, kind, *_ in described()}
    if sys.platform != "linux":
        told = {name: kind for name, kind in told.items() if not name.startswith("process_")}
    assert kinds == told


def test_the_names_that_dashboards_of_vllm_ask_for_are_there():
    assert set(OF_VLLM) <= {name for name, *_ in described()}
    labels = {name: labels for name, _, labels, _ in described()}
    assert all("model_name" in labels[name] for name in OF_VLLM)
    assert "finished_reason" in labels["vllm:request_success_total"]


def test_every_metric_says_what_it_means_and_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert all(len(text) > 10 and text.endswith(".") for *_, text in described())
    assert [name for name, *_ in described() if f"| `{name}` |" not in page] == []
    documented = set(re.findall(r"^\| `([\w:]+)` \|", page, re.MULTILINE))
    assert documented == {name for name, *_ in described()}


def test_requests_are_counted_by_route_method_and_class_of_status(tmp_path):
    app, _ = make_app(tmp_path)
    client = app.test_client()
    assert [post(client), post(client, stream=True), post(client, n="x")] == [200, 200, 400]
    client.get("/v1/models/one").close()
    client.get("/v1/models/two").close()
    client.get("/no/such/url").close()
    shown = scrape(client)
    assert shown[f"http_requests_total{{{CHAT},status=2xx}}"] == 2
    assert shown[f"http_requests_total{{{CHAT},status=4xx}}"] == 1
    models = "handler=/v1/models/<path:model_id>,method=GET,status=2xx"
    assert shown[f"http_requests_total{{{models}}}"] == 2
    assert shown["http_requests_total{handler=none,method=GET,status=4xx}"] == 1
    assert shown[f"http_request_duration_seconds_count{{{CHAT}}}"] == 3
    assert shown["transformers_api_refusals_total{code=invalid_request}"] == 1
    assert shown["transformers_api_refusals_total{code=not_found}"] == 1


def test_loads_swaps_evictions_and_failures_are_counted(tmp_path):
    app, loader = make_app(tmp_path)
    client = app.test_client()
    for name in ("one", "two", "one"):
        assert post(client, model=name) == 200
    loader.fail["load", "two"] = ModelLoadFailed("no")
    assert post(client, model="two") == 503
    failed = "transformers_api_model_load_failures_total{code=model_load_failed,model_name=two}"
    wait_for(lambda: scrape(client).get(failed) == 1)  # told after those who wait
    shown = scrape(client)
    assert shown["transformers_api_model_load_seconds_count{model_name=one}"] >= 2
    assert shown["transformers_api_model_load_seconds_count{model_name=two}"] == 1
    assert shown["transformers_api_model_swaps_total"] == 2
    assert shown["transformers_api_model_evictions_total{model_name=one}"] == 2
    assert shown["transformers_api_refusals_total{code=model_load_failed}"] == 1
    assert shown["transformers_api_model_wait_seconds_count{model_name=one}"] == 2


@pytest.mark.parametrize(
    ("engine", "stream", "code"),
    [
        pytest.param(FakeEngine(refusal=Overloaded("no")), False, "queue_full", id="refused"),
        pytest.param(FakeEngine(error=EngineFailed("no")), False, "engine_failed", id="failed"),
        pytest.param(
            FakeEngine(error=EngineFailed("no"), error_after=3), True, "engine_failed", id="midway"
        ),
    ],
)
def test_errors_are_counted_by_code_also_in_the_middle_of_a_stream(tmp_path, engine, stream, code):
    app, _ = make_app(tmp_path, {"one": engine})
    client = app.test_client()
    assert scrape(client)[f"transformers_api_refusals_total{{code={code}}}"] == 0
    post(client, stream=stream)
    shown = scrape(client)
    assert shown[f"transformers_api_refusals_total{{code={code}}}"] == 1
    assert shown["transformers_api_client_disconnects_total"] == 0


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (FakeEngine(error=ConstraintFailed("no"), error_after=3), "failed"),
        (FakeEngine(refusal=ConstraintsUnavailable("no")), "unavailable"),
    ],
)
def test_answers_that_fail_by_their_form_are_counted_by_reason(tmp_path, engine, reason):
    client = make_app(tmp_path, {"one": engine})[0].test_client()
    name = f"transformers_api_constraint_failures_total{{reason={reason}}}"
    assert scrape(client)[name] == 0
    post(client, stream=True)
    assert scrape(client)[name] == 1


def test_a_client_that_leaves_is_a_disconnect_and_one_that_reads_to_the_end_is_none(tmp_path):
    gate = threading.Semaphore(100)
    app, _ = make_app(tmp_path, {"one": FakeEngine(say("x" * 1000), gate=gate)})
    client = app.test_client()
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 20}
    client.post("/v1/chat/completions", json=body, buffered=True).close()
    assert scrape(client)["transformers_api_client_disconnects_total"] == 0
    left = client.post("/v1/chat/completions", json={**body, "max_tokens": 900})
    next(iter(left.response))
    left.close()
    shown = scrape(client)
    assert shown["transformers_api_client_disconnects_total"] == 1
    assert shown[f"http_requests_total{{{CHAT},status=2xx}}"] == 2


def test_what_is_resident_is_shown_while_it_streams_and_scraping_disturbs_nothing(tmp_path):
    gate = threading.Semaphore(0)
    app, _ = make_app(tmp_path, {"one": FakeEngine(say("abc"), gate=gate)})
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    stream = app.test_client().post("/v1/chat/completions", json=body)
    events = iter(stream.response)
    next(events)
    during = scrape(app.test_client())
    stop = threading.Event()

    def keep_scraping():
        while not stop.is_set():
            scrape(app.test_client())

    scrapers = [threading.Thread(target=keep_scraping) for _ in range(2)]
    for scraper in scrapers:
        scraper.start()
    gate.release(100)
    text = b"".join(events)
    stop.set()
    for scraper in scrapers:
        scraper.join(30)
    stream.close()
    assert text.endswith(b"data: [DONE]\n\n")
    assert during["vllm:num_requests_running{model_name=one}"] == 1
    assert during["transformers_api_model_leases{model_name=one}"] == 1
    assert during["transformers_api_requests_active"] == 1
    info = (
        "device=cpu,dtype=float32,isa=,kernels=torch,mode=batching,model_name=one,quantization=none"
    )
    assert during[f"transformers_api_model_info{{{info}}}"] == 1
    after = scrape(app.test_client())
    assert after["vllm:num_requests_running{model_name=one}"] == 0
    assert after["transformers_api_requests_active"] == 0


def test_traces_and_inspections_are_counted(tmp_path):
    app, _ = make_app(tmp_path, rate_limit_per_min=0)
    client = app.test_client()
    assert post(client, trace={"topk": 1}) == 200
    assert post(client, "/inspect/tokens", prompt="Hello") == 200
    assert post(client, "/inspect/tokens", prompt="") != 200
    shown = scrape(client)
    assert shown["transformers_api_traces_total"] == 1
    assert shown["transformers_api_inspections_total"] == 1


def test_runs_of_the_compiler_are_counted_by_their_result(tmp_path):
    made, broken = tmp_path / "made", tmp_path / "broken"
    for compiler, status in ((made, 0), (broken, 1)):
        compiler.write_text(f"#!/bin/sh\nexit {status}\n")
        compiler.chmod(0o755)
    app, _ = make_app(tmp_path, native_cache=tmp_path / "cache")
    outcomes = compilations(tmp_path / "cache", Settings().torch_threads, "auto")
    before = scrape(app.test_client())
    options = {"outcomes": outcomes, "variant": of_machine()[-1]}  # which this processor may lack
    build(tmp_path / "cache", compiler=[str(made)], **options)
    build(tmp_path / "cache", compiler=[str(made)], **options)  # it is there already
    with pytest.raises(NativeUnavailable):
        build(tmp_path / "another", compiler=[str(broken)], **options)
    after = scrape(app.test_client())
    grown = {name: after[name] - before[name] for name in after if "kernel_compilations" in name}
    assert grown == {
        "transformers_api_kernel_compilations_total{result=succeeded}": 1,
        "transformers_api_kernel_compilations_total{result=failed}": 1,
    }


def test_no_series_comes_of_what_clients_send(tmp_path):
    """Models, URLs, methods and headers at random: the series are those that there were."""
    app, _ = make_app(tmp_path, allow_download=False)
    client = app.test_client()
    draw = random.Random(1)

    def noise():
        letters = string.printable + "é\u2028{}\"'"
        return "".join(draw.choices(letters, k=draw.randint(1, 30)))

    def ask(text):
        post(client, model=text)
        for method in ("GET", "POST", draw.choice(["FOO", "PURGE", "x"])):
            url = quote(text, safe="/")
            for path in (f"/v1/models/{url}", f"/v1{url}", f"/models/{url}/load"):
                client.open(path, method=method, headers={"X-Request-Id": "a b"}).close()

    post(client)
    for text in ("some/thing", "nothing"):
        ask(text)
    client.open("/v1/models/x", method="FOO").close()
    before = set(scrape(client))
    for _ in range(150):
        ask(noise())
    assert {key for key in set(scrape(client)) - before if "method=" not in key} == set()
    methods = {m for key in scrape(client) for m in re.findall(r"method=(\w+)", key)}
    assert methods <= {"GET", "POST", OTHER}
    handlers = {m for key in scrape(client) for m in re.findall(r"handler=([^,]+)", key)}
    assert handlers <= {rule.rule for rule in app.url_map.iter_rules()} | {"none"}


def test_ten_thousand_models_are_one_label():
    metrics = Metrics(["one"])

    def tell(model):
        record = RequestRecord(method="POST", route="/generate", model=model, model_wait_s=0.1)
        record.note_error(NotFound(model))
        metrics.on_request(record)
        return metrics.page()[0].count(b"\n") if model in ("one", "model 0", "model 9999") else 0

    first = tell("one")
    assert first < tell("model 0")  # "other" comes once
    lines = [tell(f"model {index}") for index in range(10_000)]
    assert lines[-1] == lines[0]
    assert b"model 0" not in metrics.page()[0]
    assert {metrics.engine(f"m{i}") for i in range(100)} == {metrics.engine("x")}


def test_a_tally_counts_like_a_histogram_of_prometheus():
    tally = Tally((0.1, 0.5, 1.0))
    for value in (0.05, 0.1, 0.2, 0.5, 3.0):
        tally.add(value)
    assert tally.counts == [2, 2, 0, 1]
    assert tally.total == pytest.approx(3.85)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "api_keys_file": Path("keys")}, True),
        ({"host": "0.0.0.0", "metrics_enabled": True}, True),
        ({"metrics_enabled": False}, False),
    ],
)
def test_metrics_are_shown_where_nobody_else_sees_them_or_on_request(settings, shown):
    assert Settings(**settings).metrics_allowed is shown


def test_without_metrics_the_route_is_a_clear_404_and_nothing_is_counted(tmp_path):
    app, _ = make_app(tmp_path, metrics_enabled=False)
    client = app.test_client()
    assert post(client) == 200
    answer = client.get("/metrics")
    assert answer.status_code == 404
    assert "METRICS_ENABLED" in answer.json["detail"]
    assert app.extensions["transformers_api"].metrics is None


@pytest.mark.parametrize("route", ["/metrics", "/status"])
def test_with_keys_only_an_admin_may_look(tmp_path, route):
    keys = tmp_path / "keys"
    infer, admin = (KeyFile(keys).add(scope, scope) for scope in ("infer", "admin"))
    client = make_app(tmp_path, api_keys_file=keys)[0].test_client()
    headers = [{}, *({"Authorization": f"Bearer {key}"} for key in (infer, admin))]
    assert [client.get(route, headers=given).status_code for given in headers] == [401, 403, 200]


def queries(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query", "definition") and isinstance(value, str):
                yield value
            else:
                yield from queries(value)
    elif isinstance(node, list):
        for item in node:
            yield from queries(item)


def test_the_dashboard_asks_for_metrics_that_exist():
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [query for query in queries(dashboard) if query != "prometheus"]
    known = {name for name, *_ in described()}
    known |= {f"{n}_{end}" for n, k, *_ in described() if k == "histogram" for end in SERIES}
    names = {
        name
        for query in asked
        for name in re.findall(r"\b((?:vllm:|transformers_api_|http_|process_)\w+)", query)
    }
    assert len(asked) > 20
    assert sorted(names - known) == []
    left_out = {name for name, kind, *_ in described() if not any(name in n for n in names)}
    assert left_out <= NOT_DRAWN


SERIES = ("bucket", "sum", "count")
NOT_DRAWN = {
    "vllm:request_inference_time_seconds",
    "vllm:iteration_tokens_total",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "process_virtual_memory_bytes",
    "process_max_fds",
    "transformers_api_model_load_failures_total",
    "transformers_api_kernel_compilations_total",  # once in the life of a machine
    # PROMPT_LOOKUP_TOKENS is off unless asked for
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
}


def test_the_row_of_the_cluster_counts_a_replica_once_though_every_front_shows_it():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    titles = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert titles[-1] == "Cluster"
    row = panels[[panel["title"] for panel in panels].index("Cluster") + 1 :]
    queries = [target["expr"] for panel in row for target in panel["targets"]]
    of_replicas = [query for query in queries if 'replica!=""' in query]
    assert len(of_replicas) >= 6
    assert [query for query in of_replicas if "max by (replica" not in query] == []
    assert [
        query for query in queries if query not in of_replicas and 'replica=""' not in query
    ] == []


def test_the_dashboard_takes_its_source_from_a_variable():
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {v["name"]: v["type"] for v in dashboard["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)

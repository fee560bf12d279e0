"""/inspect/jobs by fakes: what begins, goes on by itself, is stopped, ends, and is forgotten."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import replace

import numpy
import pytest
from PIL import Image

from tests.fake_inspection import HEADS, LAYERS, FakeInspector, sliced
from tests.fakes import fake_model
from transformers_api.errors import ModelUnloaded, ServerShuttingDown
from transformers_api.inspection.grid_question import Grid
from transformers_api.serving.inspect import derivation_job, jobs
from transformers_api.serving.inspect.jobs import InspectionJob, Jobs

URL = "/inspect/jobs"
PATCH = {"clean": "abcdef", "corrupt": "abcdeg", "answer": 5}
CELLS = LAYERS * 6


class Gated(FakeInspector):
    """Answers grids one after the other, each when it may. ``error``: raised instead."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Semaphore(1)  # the first cells
        self.error: Exception | None = None
        self.questions = []

    def grid(self, ids, question):
        self.questions.append(question)

        def work():
            assert self.may.acquire(timeout=30)
            if self.error is not None:
                raise self.error
            cells = question.cells
            values = numpy.array([10 * cell.layer + (cell.position or 0) for cell in cells])
            return Grid(
                values=values.astype(numpy.float32),
                plain=0.0,
                donor=None if question.donor is None else 1.0,
                answer=question.answer or 97,
                against=None,
                seconds=0.125 * len(cells),  # four cells in a turn
            )

        return sliced(work)


@pytest.fixture
def gated():
    return Gated()


@pytest.fixture
def served(serve, gated):
    """An application whose model answers grids when it may."""
    served = serve()
    served.loader.build = lambda spec: replace(
        fake_model(spec, served.engines[spec.name]), inspector=gated
    )
    yield served
    gated.may.release(1000)
    served.services.jobs.end_all(ServerShuttingDown("over"))


def start(served, **fields):
    response = served.client.post("/inspect/patch", json={**PATCH, "job": True, **fields})
    assert response.status_code == 202, response.get_data(as_text=True)
    answer = response.get_json()
    assert response.headers["Location"].endswith(f"{URL}/{answer['id']}")
    return answer


def show(served, job_id, form=None):
    response = served.client.get(f"{URL}/{job_id}" + (f"?format={form}" if form else ""))
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.data if form else response.get_json()


def wait(served, job_id, done=CELLS):
    """Until so many steps are done, or it has ended."""
    job = own(served, job_id)
    while job.is_running and job.done < done:
        job.wait(job.done, 10, lambda: False)
    return show(served, job_id)


def own(served, job_id):
    return served.services.jobs._jobs[job_id]


def events(response):
    frames = [frame for frame in response.data.decode().split("\n\n") if frame]
    named = [frame.split("\n") for frame in frames if frame.startswith("event: ")]
    return [(name[7:], json.loads(data[6:])) for name, data in named]


def test_a_grid_goes_on_after_its_request_and_fills_bit_by_bit(served, gated):
    begun = start(served)
    assert begun == {"id": begun["id"], "estimate_s": 0.125 * CELLS, "cells": CELLS}
    job = show(served, begun["id"])
    assert (job["state"], job["done"], job["total"], job["kind"]) == ("running", 4, CELLS, "patch")
    assert job["result"]["grid"] == [[0, 1, 2, 3, None, None], [None] * 6]
    assert job["result"]["tokens"] == list("abcdeg")
    gated.may.release()
    assert wait(served, begun["id"], 8)["result"]["grid"][1] == [10, 11, None, None, None, None]
    gated.may.release()
    ended = wait(served, begun["id"])
    assert (ended["state"], ended["done"], ended["left_s"], ended["error"]) == ("done", 12, 0, None)
    assert ended["result"]["grid"] == [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]
    assert [len(question.cells) for question in gated.questions] == [4, 4, 4]
    assert [question.only_cells for question in gated.questions] == [False, True, True]
    listed = served.client.get(URL).get_json()["data"]
    assert [(each["id"], each["state"]) for each in listed] == [(begun["id"], "done")]
    assert "result" not in listed[0]
    assert served.swapper.status().leases == 0


def test_a_cancelled_job_keeps_what_is_there_and_is_forgotten_when_deleted_again(served, gated):
    job_id = start(served)["id"]
    answer = served.client.delete(f"{URL}/{job_id}").get_json()
    assert answer == {"id": job_id, "cancelled": True, "deleted": False}
    gated.may.release()
    job = wait(served, job_id)
    assert job["state"] == "cancelled"
    assert job["error"] == {"error": "The job was cancelled", "code": "job_cancelled"}
    assert job["result"]["grid"][0][:4] == [0, 1, 2, 3]
    assert job["result"]["grid"][1][2:] == [None] * 4
    answer = served.client.delete(f"{URL}/{job_id}").get_json()
    assert answer == {"id": job_id, "cancelled": False, "deleted": True}
    assert served.client.get(f"{URL}/{job_id}").status_code == 404
    assert served.client.delete(f"{URL}/{job_id}").status_code == 404


def test_events_tell_of_the_progress_and_have_exactly_one_end(served, gated):
    job_id = start(served)["id"]
    threading.Timer(0.05, gated.may.release, (2,)).start()
    seen = events(served.client.get(f"{URL}/{job_id}/events"))
    assert [name for name, _ in seen].count("end") == 1
    assert seen[0][1]["done"] == 4
    assert seen[-1] == ("end", {**seen[-1][1], "state": "done", "done": CELLS})
    assert {name for name, _ in seen[:-1]} == {"progress"}
    assert [name for name, _ in events(served.client.get(f"{URL}/{job_id}/events"))] == ["end"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelUnloaded("The model was unloaded"), "model_unloaded"),
        (ValueError("broken"), "engine_failed"),
    ],
)
def test_a_job_whose_model_goes_ends_with_the_error(served, gated, error, code):
    job_id = start(served)["id"]
    gated.error = error
    gated.may.release()
    name, ended = events(served.client.get(f"{URL}/{job_id}/events"))[-1]
    assert (name, ended["state"], ended["error"]["code"]) == ("end", "failed", code)
    assert "broken" not in ended["error"]["error"]
    assert show(served, job_id)["result"]["grid"][0][:4] == [0, 1, 2, 3]


def test_the_end_of_the_server_ends_jobs_and_takes_no_more(served, gated):
    job_id = start(served)["id"]
    served.services.jobs.end_all(ServerShuttingDown("The server is shutting down"))
    gated.may.release(2)
    assert wait(served, job_id)["error"]["error"] == "The server is shutting down"
    response = served.client.post("/inspect/patch", json={**PATCH, "job": True})
    assert response.status_code == 503


def test_a_server_that_ends_all_requests_ends_jobs_as_well(served):
    ended = []
    served.services.admission.on_end(ended.append)
    error = ServerShuttingDown("bye")
    served.services.admission.end_all(error)
    assert ended == [error]


def test_jobs_are_bounded_and_those_of_others_are_not_there(served, gated, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_OF_OWNER", 1)
    start(served)
    response = served.client.post("/inspect/patch", json={**PATCH, "job": True})
    assert response.status_code == 429
    assert response.get_json()["error"] == "1 jobs are running (max 1); wait for one, or cancel it"
    store, job = Jobs(), InspectionJob("a", "patch", 1, 1, dict)
    store.start(job, lambda: None, lambda: None)
    while job.is_running:
        job.wait(-1, 10, lambda: False)
    assert [len(store.of(owner)) for owner in ("a", "b")] == [1, 0]
    with pytest.raises(Exception, match="No job"):
        store.get("b", job.id)


def test_old_jobs_are_forgotten_by_age_number_and_size(monkeypatch):
    now = [0.0]
    store = Jobs(lambda: now[0])
    monkeypatch.setattr(jobs, "MOST_KEPT", 3)
    monkeypatch.setattr(jobs, "MOST_CELLS", 10)

    def ended(cells=1):
        job = InspectionJob("a", "patch", 1, cells, dict)
        store.start(job, lambda: None, lambda: None)
        while job.is_running:
            job.wait(-1, 10, lambda: False)
        job.ended_at = now[0]
        return job

    made = [ended() for _ in range(4)]
    assert store.of("a") == made[1:]
    large = ended(8)
    assert store.of("a") == [*made[2:], large]
    larger = ended(9)
    assert store.of("a") == [larger]
    now[0] += jobs.MOST_AGE_S + 1
    assert store.of("a") == []


def test_a_job_that_finds_the_queue_full_waits_and_asks_again(served, gated, monkeypatch):
    from transformers_api.errors import InspectionBusy
    from transformers_api.serving.inspect import grid_job

    monkeypatch.setattr(grid_job, "PATIENCE_S", 0.01)
    job_id = start(served)["id"]
    ask, refusals = served.services.inspections.ask, [1, 2]

    def busy(*arguments):
        if refusals:
            refusals.pop()
            raise InspectionBusy("Too many", retry_after=1)
        return ask(*arguments)

    monkeypatch.setattr(served.services.inspections, "ask", busy)
    gated.may.release(2)
    assert wait(served, job_id)["state"] == "done"


def test_a_grid_comes_in_every_form_at_once_and_from_a_job(served, gated):
    gated.may.release(20)
    job_id = start(served)["id"]
    whole = wait(served, job_id)["result"]
    assert served.client.post("/inspect/patch", json=PATCH).get_json() == whole
    for form, content_type in (
        ("npz", "application/x-npz"),
        ("png", "image/png"),
        ("html", "text/html; charset=utf-8"),
    ):
        asked = served.client.post("/inspect/patch", json={**PATCH, "format": form})
        assert asked.content_type == content_type
        accepted = {"Accept": content_type.partition(";")[0]}
        again = served.client.post("/inspect/patch", json=PATCH, headers=accepted)
        assert again.content_type == content_type
        if form != "npz":
            assert asked.data == again.data == show(served, job_id, form)
    archive = numpy.load(io.BytesIO(show(served, job_id, "npz")))
    assert archive["grid"].tolist() == whole["grid"]
    assert json.loads(bytes(archive["meta"]))["tokens"] == list("abcdeg")
    assert min(Image.open(io.BytesIO(show(served, job_id, "png"))).size) >= 128
    assert served.client.get(f"{URL}/{job_id}?format=csv").status_code == 422


def test_heads_have_names_and_text_gets_no_further_than_its_place_in_the_page(served, gated):
    gated.may.release(20)
    body = {"prompt": "<b>&", "part": "head", "format": "html"}
    page = served.client.post("/inspect/ablate", json=body)
    assert f"head {HEADS - 1}" in page.text
    body = {"clean": "<b>&", "corrupt": "<i>&", "format": "html"}
    page = served.client.post("/inspect/patch", json=body)
    assert "&lt;" in page.text
    assert "<b>" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corrupt": {"noise": 3.0}}, "corrupt.span is required"),
        ({"corrupt": {"noise": -1, "span": [0]}}, "corrupt.noise must be a number from 0"),
        ({"corrupt": {"noise": 1, "span": {"text": "zz"}}}, "corrupt.span: the prompt has"),
        ({"corrupt": {"noise": 1, "span": [9]}}, "corrupt.span must be in [-6, 5]"),
        ({"corrupt": {"noise": 1, "span": [0], "sample": 3}}, "did you mean 'samples'?"),
        ({"corrupt": 3}, 'must be a text or a list of messages, and not empty; or {"noise"'),
        ({"method": "gradient", "job": True}, "takes one pass: it is no job"),
        ({"format": "csv"}, "format must be one of"),
        ({"job": "yes"}, "job must be true or false"),
    ],
)
def test_what_is_wrong_is_named(served, fields, message):
    response = served.client.post("/inspect/patch", json={**PATCH, **fields})
    assert response.status_code == 422, response.get_data(as_text=True)
    assert message in response.get_json()["detail"]
    assert served.client.get(URL).get_json()["data"] == []


def test_noise_and_the_method_reach_the_question(served, gated):
    gated.may.release(5)
    noise = {"noise": 3.0, "span": {"text": "cd"}, "samples": 2, "seed": 9}
    body = {**PATCH, "corrupt": noise, "method": "gradient"}
    answer = served.client.post("/inspect/patch", json=body).get_json()
    question = gated.questions[-1]
    assert (question.noise.size, question.noise.positions) == (3.0, [2, 3])
    assert (question.noise.samples, question.noise.seed, question.method) == (2, 9, "gradient")
    assert answer["note"].startswith("approximate")


def test_gradients_are_asked_only_of_models_that_have_them(served, gated):
    gated.gradients = False
    response = served.client.post("/inspect/patch", json={**PATCH, "method": "gradient"})
    assert response.status_code == 422
    assert "has no gradients" in response.get_json()["detail"]


def test_where_inspection_is_off_there_are_no_jobs(serve):
    served = serve(inspect_enabled=False)
    for path in (URL, f"{URL}/job-1", f"{URL}/job-1/events"):
        assert served.client.get(path).status_code == 403


def test_a_job_leaves_half_of_the_time_to_those_who_are_answered(served, gated, monkeypatch):
    pauses = []
    monkeypatch.setattr(InspectionJob, "pause", lambda _self, seconds: pauses.append(seconds))
    gated.may.release(20)
    wait(served, start(served)["id"])
    assert pauses == []
    stats = replace(served.engine.stats(), running=1)
    monkeypatch.setattr(served.engine, "stats", lambda: stats)
    wait(served, start(served)["id"])
    assert pauses == [0.5, 0.5]


def derive(served, name, **fields):
    pairs = [{"positive": f"glad {word}", "negative": f"sad {word}"} for word in ("a", "be", "sea")]
    return served.client.post(f"/inspect/vectors/{name}/derive", json={"pairs": pairs, **fields})


def test_a_direction_is_derived_text_by_text_and_kept_when_all_are_read(served, gated, monkeypatch):
    monkeypatch.setattr(derivation_job, "TURN_S", 0.0)
    plain = gated.hidden_states

    def one_at_a_time(*asked):
        assert gated.may.acquire(timeout=10)
        return plain(*asked)

    gated.hidden_states = one_at_a_time
    gated.may.release()
    response = derive(served, "mood", job=True)
    assert response.status_code == 202
    begun = response.get_json()
    job = show(served, begun["id"])
    assert (job["kind"], job["done"], job["total"], job["result"]) == ("derive", 2, 6, {})
    gated.may.release()
    assert wait(served, begun["id"], 3)["state"] == "running"
    assert served.client.get("/inspect/vectors/mood").status_code == 404
    assert served.client.get(f"{URL}/{begun['id']}?format=npz").status_code == 422
    gated.may.release(1000)
    ended = wait(served, begun["id"], 7)
    assert (ended["state"], ended["done"], ended["error"]) == ("done", 6, None)
    at_once = derive(served, "other").get_json()
    same = {"name": "mood", "created": ended["result"]["created"]}
    assert ended["result"] == {**at_once, **same}
    numbers = [
        served.client.get(f"/inspect/vectors/{name}").get_json()["vector"]
        for name in ("mood", "other")
    ]
    assert numbers[0] == numbers[1]
    assert served.swapper.status().leases == 0


def test_a_cancelled_derivation_keeps_no_vector(served, gated, monkeypatch):
    monkeypatch.setattr(derivation_job, "TURN_S", 0.0)
    plain, texts = gated.hidden_states, threading.Semaphore(2)

    def few(*asked):
        assert texts.acquire(timeout=10)
        return plain(*asked)

    gated.hidden_states = few
    job_id = derive(served, "mood", job=True).get_json()["id"]
    assert served.client.delete(f"{URL}/{job_id}").get_json()["cancelled"]
    texts.release(1000)
    assert wait(served, job_id, 7)["state"] == "cancelled"
    assert show(served, job_id)["result"] == {}
    assert served.client.get("/inspect/vectors/mood").status_code == 404

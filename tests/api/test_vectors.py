"""/inspect/vectors by fakes: what is kept, in which forms it comes and goes, what is refused."""

from __future__ import annotations

import io

import numpy
import pytest

from transformers_api.api.inspect.vectors import GGUF, NPZ

URL = "/inspect/vectors"
ROWS = [[0.5, -1.0, 2.0], [0.1, 0.0, 3.0]]


def put(served, name, **body):
    return served.client.put(f"{URL}/{name}", json=body)


def refused(response, status):
    assert response.status_code == status, response.get_data(as_text=True)
    body = response.get_json()
    return body.get("detail") or body["error"]


def test_a_vector_is_kept_listed_replaced_and_forgotten(served):
    created = put(served, "calm", vector=ROWS, layers=[0, 1], model="fake")
    assert created.status_code == 201
    described = created.get_json()
    assert described.pop("created") > 0
    assert described == {
        "name": "calm",
        "model": "fake",
        "layers": [0, 1],
        "width": 3,
        "norms": [2.29129, 3.00167],
        "bytes": 24,
        "source": "json",
    }
    assert put(served, "calm-2", vector=[-1, 2, -4]).status_code == 201
    assert put(served, "calm-2", vector=[-0.5, 1, -2]).status_code == 200
    first, second = served.client.get(URL).get_json()["data"]
    assert first["cosine"] == {"calm-2": second["cosine"]["calm"]}
    assert second["layers"] is None
    assert served.client.delete(f"{URL}/calm").get_json() == {"name": "calm", "deleted": True}
    message = refused(served.client.get(f"{URL}/calm"), 404)
    assert message == "No vector 'calm' in the store; there are: calm-2"


def test_a_vector_comes_back_in_every_form(served):
    put(served, "calm", vector=ROWS, layers=[1, 4])
    as_json = served.client.get(f"{URL}/calm").get_json()
    assert numpy.allclose(as_json["vector"], ROWS, rtol=1e-7)
    for form, content_type in (("npz", NPZ), ("gguf", GGUF)):
        file = served.client.get(f"{URL}/calm?format={form}")
        assert file.content_type == content_type
        again = served.client.put(f"{URL}/{form}", data=file.data)
        assert again.get_json() | {"source": form} == again.get_json()
        copy = served.client.get(f"{URL}/{form}").get_json()
        assert (copy["vector"], copy["layers"]) == (as_json["vector"], [1, 4])
    archive = numpy.load(io.BytesIO(served.client.get(f"{URL}/calm?format=npz").data))
    assert archive["vector"].dtype == numpy.float32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "vector is required"),
        ({"vector": "calm"}, "must be a list of numbers"),
        ({"vector": [1, None]}, "must be a list of numbers"),
        ({"vector": [True]}, "must be a list of numbers"),
        ({"vector": [[1], [1, 2]]}, "rows of the same length"),
        ({"vector": [[]]}, "vector has the shape [1, 0]"),
        ({"vector": [1e39]}, "every number must be finite"),
        ({"vector": ROWS, "layers": [1]}, "2 rows for 1 layers"),
        ({"vector": ROWS, "layers": [1, -1]}, "must be an integer from 0 to 1 023"),
        ({"vector": ROWS, "layer": [1]}, "is unknown; did you mean 'layers'?"),
    ],
)
def test_what_is_no_vector_is_refused(served, body, message):
    assert message in refused(put(served, "calm", **body), 422)
    assert served.client.get(URL).get_json()["data"] == []


def test_names_models_forms_and_files_are_refused_by_what_is_wrong(served):
    for name in ("Calm", "x" * 65, ".calm", "a b"):
        assert "name must have 1 to 64" in refused(put(served, name, vector=[1]), 422)
    assert "not found" in refused(put(served, "calm", vector=[1], model="other"), 404)
    assert "The file is refused" in refused(served.client.put(f"{URL}/a", data=b"PK nothing"), 422)
    assert "The body is empty" in refused(served.client.put(f"{URL}/a", data=b" "), 422)
    put(served, "calm", vector=[1])
    message = refused(served.client.get(f"{URL}/calm?format=csv"), 422)
    assert message == "format must be one of: json, npz, gguf"
    message = refused(served.client.get(f"{URL}/calm?format=gguf"), 422)
    assert message == "a vector for any layer has no place in a control vector"


def test_lengths_and_cosines_of_large_and_small_numbers_are_numbers(served):
    for name, size in (("large", 3e38), ("small", 1e-30), ("one", 1.0)):
        assert put(served, name, vector=[size, 0.0, size]).status_code in (200, 201)
    listed = served.client.get(URL).get_json()["data"]
    assert {one["name"]: one["norms"] for one in listed} == {
        "large": [4.24264e38],
        "small": [1.41421e-30],
        "one": [1.41421],
    }
    assert {value for one in listed for value in one["cosine"].values()} == {1.0}


def test_a_vector_of_many_numbers_comes_back_as_a_file_only(serve):
    served = serve(inspect_max_json_cells=5)
    put(served, "calm", vector=ROWS, layers=[1, 4])
    message = refused(served.client.get(f"{URL}/calm"), 413)
    assert message == "The vector has 6 numbers (max 5 as JSON); take format=npz"
    assert served.client.get(f"{URL}/calm?format=npz").status_code == 200


def test_where_inspection_is_off_there_are_no_vectors(serve):
    served = serve(inspect_enabled=False)
    assert served.client.get(URL).status_code == 403
    assert put(served, "calm", vector=[1]).status_code == 403

"""/inspect/vectors: directions that a model is steered along or measured by, kept by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flask
from flask import Response, request

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint, read_bytes
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.services import services
from transformers_api.api.inspect import subjects
from transformers_api.api.inspect.jobs import started
from transformers_api.api.inspect.schemas.jobs import StartedJob
from transformers_api.api.inspect.schemas.vectors import (
    DerivationRequest,
    DerivedVector,
    StoredVector,
    VectorBody,
    VectorDeleted,
    VectorList,
    VectorWithNumbers,
)
from transformers_api.errors import InvalidRequest, ResponseTooLarge
from transformers_api.inspection.base import Anatomy, Array
from transformers_api.serving.inspect import arrays, vector_files
from transformers_api.serving.inspect.derivation_job import DerivationWork
from transformers_api.serving.inspect.jobs import InspectionJob
from transformers_api.serving.inspect.queue import deadline
from transformers_api.serving.inspect.vector_derivation import Streams, derive
from transformers_api.serving.inspect.vector_store import MOST_NAME, Vector, VectorStore
from transformers_api.serving.swap.loaded_model import LoadedModel

blueprint = Blueprint("vectors", __name__, dialect=NIELS, description="Directions by name")

NPZ, GGUF = "application/x-npz", "application/octet-stream"
_NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MOST_NAME - 1}}}")
_FILE = {"type": "string", "format": "binary"}
_ROW = [1.0, 0.0, 0.0]
_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": VectorBody, "example": {"vector": [_ROW], "layers": [0]}},
        GGUF: {"schema": _FILE},
    },
}
_PAIRS = [
    {"positive": "I feel calm.", "negative": "I feel angry."},
    {"positive": "A quiet day.", "negative": "A furious day."},
]


@blueprint.at("/inspect/vectors")
@blueprint.gives(VectorList)
def list_vectors() -> Any:
    """List the vectors of this key, each with its cosine to the others."""
    inspect_auth.check_enabled()
    vectors = services().vectors.of(flask.g.client)
    return {
        "object": "list",
        "data": [
            {**_described(name, vector), "cosine": _cosines(name, vectors)}
            for name, vector in vectors.items()
        ],
    }


@blueprint.at("/inspect/vectors/<name>", methods=["PUT"])
@blueprint.documents(requestBody=_BODY)
@blueprint.gives(StoredVector)
@blueprint.gives(StoredVector, 201, description="There was none of this name")
@blueprint.gives(Failed, 413, description="Too many vectors, or too many bytes")
def put_vector(name: str) -> Any:
    """Keep a vector: numbers as JSON, or a file, which is known by its first bytes.

    A GGUF control vector, an archive of numpy or safetensors: tensors `direction.N`, each added
    after layer N, or one `vector`, with `layers` where it has rows. `?model=` says for which model
    it is. Nothing is unpickled. It is kept in memory, for this key alone.
    """
    inspect_auth.check_enabled()
    inspect_auth.check_rate()
    check_name(name)
    data = read_bytes(request)
    if not data.strip() or data.lstrip()[:1] == b"{":
        body = blueprint.ARGUMENTS_PARSER.parse(VectorBody, request, location="json")
        model = _named_model(body.get("model") or request.args.get("model"))
        vector = vector_files.vector_of_numbers(body["vector"], body.get("layers"), model)
    else:
        vector = vector_files.vector_of_file(data, _named_model(request.args.get("model")))
    is_new = services().vectors.put(flask.g.client, name, vector)
    return _described(name, vector), 201 if is_new else 200


@blueprint.at("/inspect/vectors/<name>")
@blueprint.gives(VectorWithNumbers)
@blueprint.gives(_FILE, content_type=NPZ)
@blueprint.gives(_FILE, content_type=GGUF)
@blueprint.gives(Failed, 404, description="No vector of this name")
@blueprint.gives(Failed, 413, description="Too many numbers for JSON")
def get_vector(name: str) -> Any:
    """Give a vector as JSON; with `?format=` `npz`, or `gguf` for llama.cpp, as a file."""
    inspect_auth.check_enabled()
    vector = services().vectors.get(flask.g.client, name)
    form = request.args.get("format", "json")
    if form == "npz":
        return Response(vector_files.npz(name, vector), content_type=NPZ)
    if form == "gguf":
        return Response(vector_files.gguf(vector, vector.model or name), content_type=GGUF)
    if form != "json":
        raise InvalidRequest("format must be one of: json, npz, gguf", param="format")
    most = services().settings.inspect_max_json_cells
    if vector.rows.size > most:
        raise ResponseTooLarge(
            f"The vector has {vector.rows.size} numbers (max {most} as JSON); take format=npz"
        )
    rows = vector.rows if vector.layers is not None else vector.rows[0]
    return {**_described(name, vector), "vector": arrays.exact(rows)}


@blueprint.at("/inspect/vectors/<name>", methods=["DELETE"])
@blueprint.gives(VectorDeleted)
@blueprint.gives(Failed, 404, description="No vector of this name")
def delete_vector(name: str) -> Any:
    """Forget a vector."""
    inspect_auth.check_enabled()
    services().vectors.delete(flask.g.client, name)
    return {"name": name, "deleted": True}


@blueprint.at("/inspect/vectors/<name>/derive", methods=["POST"])
@blueprint.takes(DerivationRequest, example={"pairs": _PAIRS})
@blueprint.gives(DerivedVector)
@blueprint.gives(DerivedVector, 201, description="There was none of this name")
@blueprint.gives(StartedJob, 202, description="With `job`: it goes on by itself")
@blueprint.gives(Failed, 413, description="Too much text, too many tokens or too many numbers")
def derive_vector(body: dict[str, Any], name: str) -> Any:
    """Make a vector of pairs of texts that differ in one respect, and keep it.

    Its rows lead from the second side to the first one, a row for each layer. `separation` tells
    which layers know the difference, each text measured without its own pair. As a `job` it is kept
    when all texts are read.
    """
    inspect_auth.check()
    check_name(name)
    pairs = body["pairs"]
    with RequestContext(services()) as context:
        model = context.lease(body.get("model"))
        inspector = subjects.inspector_of(model)
        layers = _streams_after(body["layers"], inspector.anatomy)
        texts = [
            subjects.side_ids(model, pair[side], f"pairs[{number}].{side}")
            for side in ("positive", "negative")
            for number, pair in enumerate(pairs)
        ]
        longest = 1 if body["at"] == "last" else max(map(len, texts))
        numbers = (len(texts) + longest) * len(layers) * inspector.anatomy.hidden_size
        subjects.check_read_cells(numbers, services().settings)
        derivation = _Derivation(name, context.client, model.spec.name, texts, layers, body)
        if body["job"]:
            return _job(context, model, derivation, inspector.anatomy)
        question = Streams(texts, layers, body["at"])
        streams = services().inspections.ask(model, question, context.cancellation)
        check = deadline(services().settings.inspect_timeout_s, context.cancellation)
        answer, is_new = derivation.store(services().vectors, streams, check)
        return answer, 201 if is_new else 200


@dataclass(frozen=True)
class _Derivation:
    """A vector that is to be made of these texts: of all first sides, and then of all second."""

    name: str
    owner: str
    model: str
    texts: Sequence[Sequence[int]]
    layers: Sequence[int]
    body: Mapping[str, Any]

    def store(
        self, vectors: VectorStore, streams: Array, check: Callable[[], None]
    ) -> tuple[dict[str, Any], bool]:
        """(the answer, True where there was none of the name), once it is made and kept."""
        pairs = len(self.texts) // 2
        sides = streams[:pairs], streams[pairs:]
        derived = derive(*sides, self.layers, self.body["method"], check)
        vector = Vector(
            rows=derived.rows,
            layers=tuple(self.layers),
            source="pairs",
            model=self.model,
            separation=tuple(arrays.digits(value) for value in derived.separation),
        )
        is_new = vectors.put(self.owner, self.name, vector)
        norms = vector.norms
        scales = [gap / norm if norm else 0 for gap, norm in zip(derived.gap, norms, strict=True)]
        answer = {
            **_described(self.name, vector),
            "scales": [arrays.digits(scale) for scale in scales],
            "best_layers": list(derived.window),
            "pairs": pairs,
            "tokens": sum(map(len, self.texts)),
        }
        return answer, is_new


def _job(
    context: RequestContext, model: LoadedModel, derivation: _Derivation, anatomy: Anatomy
) -> Any:
    """Begin a job, once its first texts are read: they say how long it will take."""
    jobs, inspections, vectors = services().jobs, services().inspections, services().vectors
    jobs.check_room(derivation.owner)
    texts, layers, at = derivation.texts, derivation.layers, derivation.body["at"]
    work = DerivationWork.begin(
        texts, layers, at, lambda each: inspections.ask(model, each, context.cancellation)
    )
    answer: dict[str, Any] = {}
    cells = len(layers) * anatomy.hidden_size
    job = InspectionJob(derivation.owner, "derive", len(texts), cells, lambda: dict(answer))
    lease = context.lease_for(model, job.cancellation)

    def run() -> None:
        own = lease.model
        streams = work.run(
            job,
            lambda each: inspections.ask(own, each, job.cancellation),
            lambda: own.engine.stats().running > 0,
        )
        answer.update(derivation.store(vectors, streams, job.cancellation.check)[0])

    jobs.start(job, run, lease.release)
    return started(job, work.estimate_s)


def _streams_after(requested: Any, anatomy: Anatomy) -> list[int]:
    """Layers, each once and none the embedding. Raises InvalidRequest."""
    layers = dict.fromkeys(subjects.layers(requested, anatomy))
    if requested == "all":
        layers.pop(-1, None)
    if -1 in layers:
        raise InvalidRequest(f"layers must be in [0, {anatomy.layers - 1}]", param="layers")
    return list(layers)


def check_name(name: str) -> None:
    """Raise InvalidRequest for what is no name."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"name must have 1 to {MOST_NAME} of the characters a-z, 0-9, '.', '_' and '-', and "
            "begin with a letter or digit",
            param="name",
        )


def _named_model(model: str | None) -> str | None:
    """The name of a model of this server. Raises ModelNotFound."""
    return None if model is None else services().registry.resolve(model).name


def _described(name: str, vector: Vector) -> dict[str, Any]:
    answer = {
        "name": name,
        "model": vector.model,
        "layers": None if vector.layers is None else list(vector.layers),
        "width": vector.width,
        "norms": [arrays.digits(norm) for norm in vector.norms.tolist()],
        "bytes": vector.rows.nbytes,
        "source": vector.source,
        "created": vector.created,
    }
    if vector.separation is not None:
        answer["separation"] = list(vector.separation)
    return answer


def _cosines(name: str, vectors: Mapping[str, Vector]) -> dict[str, float]:
    own = vectors[name]
    cosines = {other: own.cosine(vector) for other, vector in vectors.items() if other != name}
    return {other: arrays.digits(value) for other, value in cosines.items() if value is not None}

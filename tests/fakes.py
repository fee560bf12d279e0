"""Stand-ins for the engine, the tokenizer, the model and the loader: milliseconds, no torch."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from tests import tokenizers
from tests.fake_inspection import FakeInspector, fake_step
from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.base import (
    NOTHING,
    ContextOverflow,
    EngineStats,
    FinishReason,
    SamplingParams,
    SequenceRequest,
    TokenOutput,
    TokenScore,
    TokenStream,
)
from transformers_api.errors import ApiError, ContextLengthExceeded, EngineDead
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, PathSource
from transformers_api.serving.swap.loaded_model import AdaptedModel, LoadedModel, PreparedAdapter
from transformers_api.serving.text.model_text import ModelText, TokenizerOnly

Reply = Callable[[Sequence[int], SamplingParams, int], Iterable[int]]
EOS = tokenizers.END_OF_TEXT


def fake_tokenizer() -> Any:
    """A real one: ids 0..255 are bytes, 256 <|im_start|>, 257 <|im_end|>, 258 end of text, chatml."""
    return tokenizers.byte_level()


def say(text: str) -> Reply:
    """A script: every sequence says ``text``, then ends."""
    return lambda _prompt, _params, _index: list(text.encode())


def default_reply(prompt_ids: Sequence[int], params: SamplingParams, _index: int) -> list[int]:
    """A sentence that depends on the prompt and on the seed, and on nothing else."""
    digest = zlib.crc32(",".join(map(str, prompt_ids)).encode()) % 1000
    seed = "" if params.seed is None else f" with seed {params.seed}"
    return list(f"Reply {digest}{seed}, no more.".encode())


class FakeEngine:
    """Says what ``reply(prompt_ids, params, index)`` scripts, then its end-of-sequence token.

    The script may be endless. Without ``gate`` everything is in the stream when ``submit``
    returns. With a ``gate`` a thread of its own writes: a semaphore lets one token through per
    release, an event holds all back until it is set. Sequences take turns, a token each.
    ``error`` ends every sequence after ``error_after`` tokens; ``refusal`` is raised by submit.
    Where a plan for a trace is given, each token carries one.
    """

    run_type: type[Run]

    def __init__(
        self,
        reply: Reply = default_reply,
        *,
        gate: threading.Event | threading.Semaphore | None = None,
        error: ApiError | None = None,
        error_after: int = 0,
        refusal: ApiError | None = None,
        cached_tokens: int = 0,
        max_model_len: int = 2048,
        vocab_size: int = 259,
        eos_token_ids: Collection[int] = (EOS,),
        model: Any = None,
    ) -> None:
        self.reply = reply
        self.gate = gate
        self.error = error
        self.error_after = error_after
        self.refusal = refusal
        self.cached_tokens = cached_tokens
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.context_overflow: ContextOverflow = None
        self.eos_token_ids = frozenset(eos_token_ids)
        self.model = model
        self.submitted: list[list[SequenceRequest]] = []
        self.observed: list[dict[str, Any]] = []  # of each submit
        self.aborted: list[int | None] = []  # as the callers said it
        self.closed = threading.Event()
        self.closed_with: ApiError | None = None
        self._lock = threading.Lock()
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0, "cached_tokens": 0}
        self._running = 0
        self._threads: list[threading.Thread] = []

    def submit(
        self, requests: Sequence[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        if self.refusal is not None:
            raise self.refusal
        if self.closed.is_set():
            raise self.closed_with or EngineDead("The engine is closed")
        for request in requests:
            self._check(request)
        self.submitted.append(list(requests))
        self.observed.append(dict(observe))
        run = self.run_type(self, requests, observe)
        with self._lock:
            self._running += len(requests)
        if self.gate is None:
            run.play()
        else:
            thread = threading.Thread(target=run.play, daemon=True, name="fake-engine")
            self._threads.append(thread)
            thread.start()
        return run.stream

    def call(self, visit: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(visit(self.model))
        except Exception as error:
            future.set_exception(error)
        return future

    def stats(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                running=self._running, steps=self._counts["generated_tokens"], **self._counts
            )

    def close(self, error: ApiError | None = None) -> None:
        if self.closed_with is None:
            self.closed_with = error
        self.closed.set()
        for thread in self._threads:
            thread.join(10)

    def count(self, *, finished: int = 0, **tokens: int) -> None:
        with self._lock:
            self._running -= finished
            for name, number in tokens.items():
                self._counts[name] += number

    def _check(self, request: SequenceRequest) -> None:
        total = len(request.prompt_ids) + request.params.max_tokens
        if not request.prompt_ids:
            raise ValueError("an empty prompt reached the engine")
        if total > self.max_model_len:
            raise ContextLengthExceeded(f"{total} tokens do not fit {self.max_model_len}")


class Run:
    """One submit: its stream, its scripts and who of it was aborted."""

    def __init__(
        self, engine: FakeEngine, requests: Sequence[SequenceRequest], observe: Mapping[str, Any]
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.plan = observe.get("trace")
        self.aborted: set[int] = set()
        self.stream = TokenStream(len(requests), self.abort)

    def abort(self, index: int | None = None) -> None:
        self.engine.aborted.append(index)
        self.aborted |= set(range(len(self.requests))) if index is None else {index}

    def play(self) -> None:
        scripts = {i: self.script(i, request) for i, request in enumerate(self.requests)}
        while scripts:
            for index in list(scripts):
                output = self.interruption(index) or next(scripts[index])
                is_last = output.finish_reason is not None
                # Counted first: who has read the last one may ask for the counts.
                self.engine.count(
                    finished=int(is_last), generated_tokens=int(output.token_id is not None)
                )
                self.stream.put(replace(output, index=index))
                if is_last:
                    del scripts[index]

    def interruption(self, index: int) -> TokenOutput | None:
        """Wait for the gate; an output when the sequence must end instead."""
        while True:
            if index in self.aborted:
                return TokenOutput(finish_reason=FinishReason.ABORT)
            if self.engine.closed.is_set():
                error = self.engine.closed_with or EngineDead("The engine is closed")
                return TokenOutput(finish_reason=FinishReason.ERROR, error=error)
            if self.passes_gate():
                return None

    def passes_gate(self) -> bool:
        gate = self.engine.gate
        if gate is None:
            return True
        wait = gate.wait if isinstance(gate, threading.Event) else gate.acquire
        return wait(timeout=0.005)

    def script(self, index: int, request: SequenceRequest) -> Iterator[TokenOutput]:
        """The outputs of one sequence, in order; the last has a finish reason."""
        cached = self.engine.cached_tokens
        first = {"cached_tokens": cached, "prompt_scores": prompt_scores(request)}
        self.engine.count(prompt_tokens=len(request.prompt_ids), cached_tokens=cached)
        for position, output in enumerate(self.tokens(index, request)):
            if self.engine.error is not None and position == self.engine.error_after:
                yield TokenOutput(finish_reason=FinishReason.ERROR, error=self.engine.error)
                return
            yield replace(output, **first) if position == 0 else output

    def tokens(self, index: int, request: SequenceRequest) -> Iterator[TokenOutput]:
        params = request.params
        ends = params.stop_token_ids | (
            frozenset() if params.ignore_eos else self.engine.eos_token_ids
        )
        if params.max_tokens == 0:
            yield TokenOutput(finish_reason=FinishReason.LENGTH)
            return
        said = (t for t in self.said(index, request))
        for position, token_id in enumerate(islice(said, params.max_tokens), 1):
            if token_id in ends and position > params.min_tokens:
                reason = FinishReason.STOP
            else:
                reason = FinishReason.LENGTH if position == params.max_tokens else None
            yield TokenOutput(
                token_id=token_id,
                score=score(token_id, params.logprobs),
                finish_reason=reason,
                extras=self.noted(request, position - 1, token_id),
            )
            if reason is not None:
                return

    def noted(self, request: SequenceRequest, step: int, token_id: int) -> Mapping[str, Any]:
        if self.plan is None:
            return NOTHING
        greedy = request.params.temperature == 0
        return {"trace": fake_step(self.plan, request.prompt_ids, step, token_id, greedy)}

    def said(self, index: int, request: SequenceRequest) -> Iterable[int]:
        script = self.engine.reply(request.prompt_ids, request.params, index)
        if request.params.ignore_eos:
            return cycle(script)
        end = min(self.engine.eos_token_ids) if self.engine.eos_token_ids else EOS
        return chain(script, cycle([end]))


FakeEngine.run_type = Run


def score(token_id: int, top: int | None) -> TokenScore | None:
    """A made-up score: -0.5 for the token, then its neighbours at -1.5, -2.5, …"""
    if top is None:
        return None
    ranked = ((token_id + i, -0.5 - i) for i in range(top))
    return TokenScore(token_id, -0.5, tuple((i % (EOS + 1), logprob) for i, logprob in ranked))


def prompt_scores(request: SequenceRequest) -> tuple[TokenScore | None, ...] | None:
    top = request.params.prompt_logprobs
    if top is None:
        return None
    return (None, *(score(token_id, top) for token_id in request.prompt_ids[1:]))


def fake_spec(name: str = "fake", **fields: Any) -> ModelSpec:
    """A registry entry that points nowhere."""
    return ModelSpec(name=name, **{"source": PathSource(Path("nowhere")), **fields})


def fake_model(
    spec: ModelSpec | None = None, engine: FakeEngine | None = None, **fields: Any
) -> LoadedModel:
    """A resident model around a FakeEngine; ``fields`` replace those of LoadedModel."""
    tokenizer = fields.pop("tokenizer", None) or fake_tokenizer()
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    given: dict[str, Any] = {
        "spec": spec or fake_spec(),
        "engine": engine or FakeEngine(vocab_size=max(size, 259)),
        "tokenizer": tokenizer,
        "device": "cpu",
        "dtype": "float32",
        "bytes": 1000,
        "load_s": 0.1,
        "fingerprint": "fp_fake",
        "created": 1_700_000_000,
        "inspector": FakeInspector(),
    } | fields
    return LoadedModel(**given)


class FakeLoader:
    """Meets serving.models.Loader. Stages: "prepare", "check_memory", "load".

    ``fail[stage]`` is raised there (every time until removed); ``hold[stage]`` is waited for;
    ``entered[stage]`` is released once per entry, so a test can wait until a stage is reached.
    Keys may also be (stage, model name). ``calls`` records (stage, model name) in order.
    """

    STAGES = ("prepare", "check_memory", "load")  # of a load; "text" is one of its own

    def __init__(self, build: Callable[[ModelSpec], LoadedModel] | None = None) -> None:
        self.build = build or (lambda spec: fake_model(spec))
        self.fail: dict[str | tuple[str, str], Exception] = {}
        self.hold: dict[str | tuple[str, str], threading.Event] = {}
        others = ("text", "prepare_adapter", "adapt")
        self.entered = {stage: threading.Semaphore(0) for stage in (*self.STAGES, *others)}
        self.calls: list[tuple[str, str]] = []
        self.freed_bytes: list[int] = []  # what check_memory was told, in order
        self.fits_beside = False
        self.progress: list[tuple[float, str]] = []  # what a load says of how far it is
        self.loaded: list[LoadedModel] = []

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def text(self, spec: ModelSpec) -> ModelText:
        self._stage("text", spec)
        tokenizer = fake_tokenizer()
        size = len(tokenizer)
        return TokenizerOnly(spec=spec, tokenizer=tokenizer, vocab_size=size, max_model_len=2048)

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        progress(0.0, "preparing")
        self._stage("prepare", spec)
        progress(1.0, "ready")
        return ModelFiles(Path("nowhere"), 1000, 250, "float32", 1_700_000_000)

    def prepare_adapter(
        self, spec: ModelSpec, progress: Callable[[float, str], None]
    ) -> PreparedAdapter:
        self._stage("prepare_adapter", spec)
        files = ModelFiles(Path("nowhere"), 1000, 250, "float32", 1_700_000_000)
        return AdapterSource(spec.name, Path("nowhere"), (), 10), files

    def find_adapter(self, spec: ModelSpec) -> PreparedAdapter | None:
        return None

    def adapt(
        self, model: LoadedModel, spec: ModelSpec, source: AdapterSource, **_options: Any
    ) -> LoadedModel:
        self._stage("adapt", spec)
        return AdaptedModel.of(model, spec, FakeEngine())

    def check_memory(self, spec: ModelSpec, files: ModelFiles, freed_bytes: int) -> bool:
        self.freed_bytes.append(freed_bytes)
        self._stage("check_memory", spec)
        return self.fits_beside

    def load(
        self, spec: ModelSpec, files: ModelFiles, progress: Callable[[float, str], None]
    ) -> LoadedModel:
        for share, text in self.progress:
            progress(share, text)
        self._stage("load", spec)
        model = self.build(spec)
        self.loaded.append(model)
        return model

    def count(self, stage: str, name: str | None = None) -> int:
        return sum(s == stage and name in (None, n) for s, n in self.calls)

    def _stage(self, stage: str, spec: ModelSpec) -> None:
        self.calls.append((stage, spec.name))
        self.entered[stage].release()
        for key in (stage, (stage, spec.name)):
            with suppress(KeyError):
                assert self.hold[key].wait(20), f"{key} was held for ever"
        for key in (stage, (stage, spec.name)):
            if key in self.fail:
                raise self.fail[key]

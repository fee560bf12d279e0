"""The models of all replicas, as a front gives out leases on them.

A lease is no promise of a replica: the model's facts are had once, from a replica that has it in
memory then, and each request is a lease of its own where it arrives.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from transformers_api import logs
from transformers_api.cluster.messages import (
    Caller,
    ModelFacts,
    TextFacts,
    place_of,
)
from transformers_api.cluster.remote_model import remote_base, remote_model
from transformers_api.cluster.transport import Transport, ask
from transformers_api.engine.base import EngineStats
from transformers_api.errors import ApiError
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.replica_status import ReplicaStatus
from transformers_api.serving.swap.residency import (
    Lease,
    SwapperStatus,
    renewed,
    shutting_down,
)
from transformers_api.serving.text.model_text import ModelText, TokenizerOnly
from transformers_api.serving.upstream.loop import result

MOST_MODELS = 64  # whose facts are kept; tokenizers are large
SETTLE_S = 0.4  # until all routers know where a model has come to
Entry = tuple[ModelFacts, LoadedModel]


class ClusterModels:
    """Meets ModelPool, for the models of all replicas, or (``encoder``) those beside them."""

    def __init__(
        self,
        transport: Transport,
        registry: ModelRegistry,
        *,
        encoder: bool = False,
    ) -> None:
        self._transport = transport
        self._registry = registry
        self._encoder = encoder
        self._lock = threading.Lock()
        self._facts: OrderedDict[str, Entry] = OrderedDict()
        self._fetching: dict[str, Future[Entry]] = {}
        self._leases: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._refusal: ApiError | None = None
        self.replicas: Sequence[ReplicaStatus] = ()

    def lease(
        self,
        spec: ModelSpec,
        *,
        model_id: str | None = None,
        client: str = "",
        cancellation: Cancellation | None = None,
        timeout: float | None = None,
    ) -> Lease:
        """See Swapper."""
        self._check_open()
        cancellation = cancellation or Cancellation()
        cancellation.check()
        caller = Caller(spec=spec, client=client, encoder=self._encoder)
        facts, base = self._known_facts(spec) or self._fetched(caller, cancellation)
        model = remote_model(
            self._transport, base, caller, facts, cancellation, partial(self.forget, spec)
        )
        with self._lock:
            self._leases[spec.name] += 1
        return Lease(model, partial(self._release, spec.name))

    def load(
        self,
        model_id: str,
        *,
        device: str | None = None,
        client: str = "",
        wait: bool = True,
        timeout: float | None = None,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """See Swapper."""
        self._check_open()
        spec = self._registry.resolve(model_id)
        work = partial(self._load, spec, device, client, cancellation or Cancellation())
        if wait:
            return work()
        threading.Thread(target=work, name=f"load {spec.name}", daemon=True).start()
        return True

    def evict(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        wait: bool = True,
        cancellation: Cancellation | None = None,
    ) -> bool:
        """See Swapper; out of the memory of all replicas."""
        name = None if model_id is None else self._registry.resolve(model_id).name
        future = self._transport.start(self._transport.broadcast("evict", name, self._encoder))
        with self._lock:
            self._facts.pop(name or "", None)
        return any(answer is True for answer in future.result())

    def status(self) -> SwapperStatus:
        """See Swapper."""
        replicas = self.replicas
        if self._encoder:
            name = next((each.encoder for each in replicas if each.encoder), None)
            return SwapperStatus(state="ready" if name else "empty", model=name)
        with self._lock:
            waiting = Counter({name: count for name, count in self._waiting.items() if count})
            leases = sum(self._leases.values())
        return _together(replicas, waiting, leases)

    def resident(self) -> LoadedModel | None:
        """None: of several replicas none is the one."""
        return None

    def refuse(self, error: ApiError | None = None) -> None:
        """See Swapper."""
        self._refusal = error or shutting_down()

    def close(self, error: ApiError | None = None) -> None:
        """See Swapper. Replicas go on, for other fronts."""
        self.refuse(error)

    def wake(self) -> None:
        """See Swapper: nobody waits here for what is not announced."""

    def text(self, spec: ModelSpec) -> ModelText:
        """See ``serving.swap.Loader``."""
        if (entry := self._known_facts(spec)) is not None:
            return entry[1]
        caller = Caller(spec=spec, request_id=logs.request_id.get())
        facts: TextFacts = ask(self._transport, Cancellation(), "text", place_of(spec), caller)
        return TokenizerOnly(
            spec=spec,
            tokenizer=facts.tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
        )

    def forget(self, spec: ModelSpec) -> None:
        """Ask for the facts anew, before the next request."""
        with self._lock:
            self._facts.pop(spec.name, None)

    def _known_facts(self, spec: ModelSpec) -> Entry | None:
        with self._lock:
            entry = self._facts.get(spec.name)
            if entry is None or entry[1].spec != spec:
                return None
            self._facts.move_to_end(spec.name)
            return entry

    def _fetched(self, caller: Caller, cancellation: Cancellation) -> Entry:
        """The facts, from a replica that has loaded the model for it; once for all who wait."""
        spec, own = caller.spec, Future[Entry]()
        with self._lock:
            self._waiting[spec.name] += 1
            fetching = self._fetching.get(spec.name)
            if fetching is None:
                caller = replace(caller, request_id=logs.request_id.get())
                fetching = self._transport.start(self._fetch(caller))
                self._fetching[spec.name] = fetching
        try:
            fetching.add_done_callback(partial(_pass_on, own))
            return result(own, cancellation)
        finally:
            with self._lock:
                self._waiting[spec.name] -= 1

    async def _fetch(self, caller: Caller) -> Entry:
        spec = caller.spec
        try:
            facts: ModelFacts = await self._transport.call("describe", self._place(spec), caller)
            entry = facts, await asyncio.to_thread(remote_base, self._transport, spec, facts)
            if facts.age_s < SETTLE_S:
                await asyncio.sleep(SETTLE_S)
        finally:
            with self._lock:
                self._fetching.pop(spec.name, None)
        with self._lock:
            self._facts[spec.name] = entry
            if len(self._facts) > MOST_MODELS:
                self._facts.popitem(last=False)
        return entry

    def _load(
        self, spec: ModelSpec, device: str | None, client: str, cancellation: Cancellation
    ) -> bool:
        caller = Caller(spec=spec, client=client, request_id=logs.request_id.get())
        loaded = ask(self._transport, cancellation, "load", self._place(spec), caller, device)
        return bool(loaded)

    def _place(self, spec: ModelSpec) -> str:
        """The id that requests for the model are routed by; encoders are on any replica."""
        return "" if self._encoder else place_of(spec)

    def _release(self, name: str) -> None:
        with self._lock:
            self._leases[name] -= 1

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise renewed(self._refusal)


def _pass_on(own: Future[Entry], shared: Future[Entry]) -> None:
    """Give the outcome of ``shared`` to one of those who wait for it."""
    if not own.set_running_or_notify_cancel():
        return
    if (error := shared.exception()) is not None:
        own.set_exception(renewed(error) if isinstance(error, ApiError) else error)
    else:
        own.set_result(shared.result())


def _together(
    replicas: Sequence[ReplicaStatus], waiting: Counter[str], leases: int
) -> SwapperStatus:
    """The replicas as if they were one server: the first that has a model speaks for all."""
    holders = [each for each in replicas if each.swapper.model is not None]
    first = next(iter(holders or replicas), None)
    own = SwapperStatus(state="empty") if first is None else first.swapper
    for each in replicas:
        waiting.update(each.swapper.waiting)
    stats = [each.swapper.engine for each in replicas]
    return replace(
        own,
        since=time.monotonic() - (first.age_s if first else 0.0),
        engine=replace(
            own.engine,
            running=sum(each.running for each in stats),
            waiting=sum(each.waiting for each in stats),
            prompt_tokens=sum(each.prompt_tokens for each in stats),
            generated_tokens=sum(each.generated_tokens for each in stats),
        )
        if stats
        else EngineStats(),
        leases=leases,
        waiting=dict(waiting),
        last_errors={
            name: text for each in replicas for name, text in each.swapper.last_errors.items()
        },
        replicas=tuple(replicas),
    )

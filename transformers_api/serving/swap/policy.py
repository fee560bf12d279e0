"""The swap policy: the resident model, requests for others, the next step. No threads or clock.

The swapper calls everything here while it holds its condition, and carries the steps out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from transformers_api.errors import ApiError
from transformers_api.serving.models.spec import Source
from transformers_api.serving.models.weight_fidelity import weight_fidelity
from transformers_api.serving.swap.history import SwapHistory
from transformers_api.serving.swap.residency import (
    QUIET_S,
    Residency,
    SwapperStatus,
    SwapRequest,
    Waiter,
    cancelled,
    renewed,
)
from transformers_api.serving.swap.swap_time import SwapTime

Step = tuple[Literal["check", "load"], SwapRequest] | tuple[Literal["evict"], Residency]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapRules:
    """Times of switches and evictions, in seconds."""

    swap_after_s: float
    drain_s: float
    min_resident_s: float = 0.0
    idle_unload_s: float | None = None
    overlap: bool = False


class SwapPolicy:
    """The resident model, the queues for others, and the decision which of them comes next."""

    def __init__(self, rules: SwapRules, let_go: Callable[[Residency], None]) -> None:
        self.rules = rules
        self.resident: Residency | None = None  # grants leases
        self.leaving: list[Residency] = []  # drain, and grant none
        self.targets: dict[tuple[str, Source, str | None], SwapRequest] = {}  # wanted, not resident
        self.decided: SwapRequest | None = None  # comes next
        self.fallback: SwapRequest | None = None  # was evicted, and comes back if nothing else does
        self._let_go = let_go
        self._swap_time = SwapTime()
        self.history = SwapHistory()

    # Callers.

    def join(self, target: SwapRequest, now: float, wants_lease: bool, client: str = "") -> Waiter:
        """One more caller in the queue of ``target``, or of one like it that is there already."""
        target = self.targets.setdefault(target.key, target)
        waiter = Waiter(target, now, wants_lease, client)
        target.waiters.append(waiter)
        return waiter

    def is_loading_on_request(self, name: str) -> bool:
        """True where a caller has asked, or had asked, for the model itself and not an answer."""
        if self.fallback is not None and self.fallback.spec.name == name:
            return True
        targets = (target for target in self.targets.values() if target.spec.name == name)
        return any(not waiter.wants_lease for target in targets for waiter in target.waiters)

    def withdraw(self, waiter: Waiter, error: ApiError) -> None:
        """Take a caller out of the queue, unless it was answered already."""
        if not waiter.answered.is_set():
            waiter.target.waiters.remove(waiter)
            waiter.refuse(error)
            self.drop_if_unwanted(waiter.target)

    def cancel_loads(self, name: str) -> bool:
        """Take back the requests to load a model that is not read yet; True where there were any.

        Those who wait for an answer of it stay. Where nobody does, its download ends.
        """
        coming = [target for target in self.targets.values() if target.spec.name == name]
        waiters = [waiter for target in coming for waiter in target.waiters]
        loads = [w for w in waiters if not (w.wants_lease or w.target.is_loading)]
        for waiter in loads:
            self.withdraw(waiter, cancelled(name))
        for target in coming:
            if target.is_preparing and not target.waiters:
                target.is_cancelled = True
                del self.targets[target.key]  # whoever comes now begins anew
        return bool(loads)

    def serve_waiters(self, now: float) -> None:
        """Answer everybody whom the resident model serves."""
        resident = self.resident
        assert resident is not None
        for target in list(self.targets.values()):
            if resident.serves(target.spec, target.device):
                for waiter in target.waiters:
                    if waiter.wants_lease:
                        waiter.lease = resident.grant(now, self._let_go, waiter.client)
                    waiter.answered.set()
                target.waiters.clear()
                self.drop_if_unwanted(target)

    def refuse_waiters(self, target: SwapRequest, error: ApiError) -> None:
        """Answer everybody who waits for ``target`` with an error, and forget it."""
        for waiter in target.waiters:
            waiter.refuse(renewed(error))
        target.waiters.clear()
        if self.targets.get(target.key) is target:
            del self.targets[target.key]

    def drop_if_unwanted(self, target: SwapRequest) -> None:
        """Forget a target that nobody waits for; a preparation in progress may be joined."""
        if target.waiters or target.is_preparing or target is self.decided:
            return
        if self.targets.get(target.key) is target:
            del self.targets[target.key]

    # What is where.

    def in_memory(self, name: str | None = None) -> Iterator[Residency]:
        """The resident model and those on their way out, of this name."""
        resident = [] if self.resident is None else [self.resident]
        for residency in resident + self.leaving:
            if name in (None, residency.spec.name):
                yield residency

    def status(self, last_errors: Mapping[str, str]) -> SwapperStatus:
        """A snapshot of all of it."""
        residency = next(self.in_memory(), None)
        coming = self._coming()
        status = SwapperStatus(
            state="empty" if coming is None else "loading",
            loading=coming.spec.name if coming else None,
            loading_since=coming.made_at if coming else 0.0,
            stage=coming.stage if coming else "waiting",
            last_load_s=self.history.load_s(coming.spec.name) if coming else None,
            progress=coming.progress[0] if coming else 0.0,
            progress_text=coming.progress[1] if coming else "",
            waiting=self._waiting(),
            last_errors=last_errors,
            swaps=tuple(self.history.events),
        )
        if residency is None or residency.model is None:
            return status
        model = residency.model
        return replace(
            status,
            state="ready" if residency is self.resident else "draining",
            model=residency.spec.name,
            device=model.device,
            dtype=model.dtype,
            quantization=model.quantization,
            weights=weight_fidelity(model.file_types, model.quantization, model.dtype),
            kernels=model.kernels,
            isa=model.isa,
            bytes=model.bytes,
            load_s=model.load_s,
            since=residency.since,
            engine=model.engine.stats(),
            max_model_len=model.engine.max_model_len,
            leases=residency.leases,
        )

    def _coming(self) -> SwapRequest | None:
        requested = (target for target in self.targets.values() if target.waiters)
        return self.decided or self.fallback or next(requested, None)

    def _waiting(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for target in self.targets.values():
            if target.waiters:
                name = target.spec.name
                counts[name] = counts.get(name, 0) + len(target.waiters)
        return counts

    # Decisions.

    def next(self, now: float) -> Step | None:
        """The step to take now; None when there is only waiting."""
        self._reconsider(now)
        if self.decided is None:
            unchecked = next(self._unchecked(), None)
            if unchecked is not None:
                return "check", unchecked
            self.decided = self._choose(now)
        self._retire_when_due(now)
        for residency in self.leaving:
            if residency.may_go(now):
                return "evict", residency
        if self.leaving:
            return None
        if self.decided is not None:
            return "load", self.decided
        if self.fallback is not None and self.resident is None:
            return "load", self.fallback
        return None

    def deadline(self, now: float) -> float:
        """The next time at which a step may be due that no call announces; infinite for never."""
        times = [r.drain_until for r in self.leaving if r.drain_until is not None]
        if self.resident is not None and self.decided is None:
            if first := self._first(now):
                times.append(self._due(first))
            times += [self._affordable_at(t) for t in self._prepared() if self._must_wait(t, now)]
            if self.resident.leases == 0:
                times.append(self._idle_end(self.resident))
        return min(times, default=math.inf)

    def retire(
        self, residency: Residency, now: float, successor: SwapRequest | None = None
    ) -> None:
        """Let nobody have the resident model any more; it goes when its leases have ended."""
        assert residency is self.resident
        self.resident = None
        self.leaving.append(residency)
        residency.successor = successor
        residency.drain_until = now + self.rules.drain_s

    def publish(self, residency: Residency, target: SwapRequest) -> None:
        """``target`` was loaded: it is the resident model now."""
        replaced = self.resident or target.replaced
        evicted = replaced.spec.name if replaced else None
        if self.resident is not None:
            self.retire(self.resident, residency.since, target)
        self.resident = residency
        self.decided = self.fallback = None
        self.history.loaded(target.spec.name, residency.load_s, evicted)
        for client in target.clients if target.is_charged else ():
            self._swap_time.charge(client, residency.load_s, residency.since)
        self.serve_waiters(residency.since)
        self.drop_if_unwanted(target)

    def gone(self, residency: Residency) -> None:
        """It was evicted."""
        if residency in self.leaving:
            self.leaving.remove(residency)
        if residency.successor is not None:
            residency.successor.replaced = residency
        elif not (self.fallback and self.fallback.spec.name == residency.spec.name):
            self.history.unloaded(residency.spec.name)

    def failed(self, target: SwapRequest, error: ApiError) -> None:
        """``target`` cannot be had: tell who waits for it, and bring back what it replaced."""
        replaced = target.replaced.spec.name if target.replaced else None
        self.history.failed(target.spec.name, error.message, replaced)
        if target is self.fallback:
            self.fallback = None
        elif target is self.decided:
            self.decided = None
            if self.resident is None and target.replaced is not None:
                old = target.replaced
                self.fallback = SwapRequest(old.spec, old.spec.device, old.files)
        self.refuse_waiters(target, error)

    def end(self, error: ApiError) -> list[Residency]:
        """Tell all who wait, and forget everything; gives what is in memory."""
        for target in list(self.targets.values()):
            self.refuse_waiters(target, error)
        in_memory = list(self.in_memory())
        self.resident = self.decided = self.fallback = None
        self.leaving = []
        return in_memory

    def _reconsider(self, now: float) -> None:
        """Take a decision back when nobody waits for it any more and nothing was evicted for it."""
        target = self.decided
        if target is None or target.waiters or target.replaced is not None:
            return
        self.decided = None
        self.drop_if_unwanted(target)
        for residency in self.leaving:
            if residency.successor is target:
                self.leaving.remove(residency)
                residency.drain_until = residency.successor = None
                self.resident = residency
                self.serve_waiters(now)
                return

    def _prepared(self) -> Iterator[SwapRequest]:
        return (t for t in self.targets.values() if t.waiters and t.files is not None)

    def _unchecked(self) -> Iterator[SwapRequest]:
        for target in self._prepared():
            if not target.is_checked or target.checked_beside is not self.resident:
                yield target

    def _first(self, now: float) -> SwapRequest | None:
        """The model that comes next, once a switch to it is due."""
        return min(
            self._prepared(),
            key=lambda target: (self._must_wait(target, now), target.head_since),
            default=None,
        )

    def _choose(self, now: float) -> SwapRequest | None:
        target = self._first(now)
        if target is None or now < self._due(target):
            return None
        others = set().union(*(other.clients for other in self._prepared()))
        target.is_charged = bool(others - target.clients) or self._others_use_resident(target)
        return target

    def _others_use_resident(self, target: SwapRequest) -> bool:
        """True where ``target`` is not asked for by all those who use the resident model."""
        resident = self.resident
        return resident is not None and bool(resident.clients - target.clients)

    def _must_wait(self, target: SwapRequest, now: float) -> bool:
        """True where those who can pay for their load come before it."""
        return all(target.clients) and now < self._affordable_at(target)

    def _is_in_demand(self, target: SwapRequest) -> bool:
        """True where others have asked for the resident model since ``target`` was asked for.

        Who asked for it after that caller came is likely to do so again: each switch would be
        followed by one back. Where nobody did, as with a single user, nothing is waited for.
        """
        resident = self.resident
        return resident is not None and (
            resident.leases > 0 or resident.asked_at > target.head_since
        )

    def _due(self, target: SwapRequest) -> float:
        """From when on a switch to ``target`` may be decided."""
        resident, min_s = self.resident, self.rules.min_resident_s
        if resident is None or not self._is_in_demand(target):
            return target.head_since
        paid = math.inf  # who is alone with all models gains nothing by more switches
        if self._others_use_resident(target):
            paid = max(self._affordable_at(target), target.head_since, resident.stayed(min_s))
        settled = min(map(self._swap_time.settled_at, target.clients))
        if resident.leases:
            patient = max(target.head_since + self.rules.swap_after_s, settled)
            return min(paid, max(patient, resident.held_enough(min_s)))
        if settled > resident.idle_since:  # they owe: until it is really idle
            return min(
                paid, max(settled, resident.idle_enough(min_s)), resident.idle_since + QUIET_S
            )
        return min(paid, resident.idle_enough(min_s))

    def _affordable_at(self, target: SwapRequest) -> float:
        """From when on one of those who wait for it can pay for its load."""
        guess = self.resident.load_s if self.resident else 0.0
        load_s = self.history.load_s(target.spec.name)
        load_s = guess if load_s is None else load_s
        return min(self._swap_time.affordable_at(client, load_s) for client in target.clients)

    def _retire_when_due(self, now: float) -> None:
        resident, target = self.resident, self.decided
        if resident is None:
            return
        if target is not None:
            if not (self.rules.overlap and target.fits_beside):
                self.retire(resident, now, target)
        elif resident.leases == 0 and now >= self._idle_end(resident):
            self.retire(resident, now)
        elif resident.leases == 0 and resident.is_outdated and not self._waiting():
            self.retire(resident, now)  # it would be loaded twice if another one is about to come
            self.fallback = SwapRequest(resident.spec, resident.spec.device, resident.files)

    def _idle_end(self, resident: Residency) -> float:
        idle_s = self.rules.idle_unload_s
        return math.inf if idle_s is None else resident.idle_since + idle_s

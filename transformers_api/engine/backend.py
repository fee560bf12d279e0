"""The protocol of what runs a model: torch, CUDA graphs, native kernels. Torch-free.

A backend answers for one way of computing: whether it can run a model and why not, its runner, its
sampler, its token statistics, its attention probabilities. ``backends.py`` lists those of this
machine, the fastest first; the loader takes the first that can. A backend keeps no model alive.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from transformers_api.engine.base import EngineFacts
from transformers_api.engine.standby import StandbyModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from transformers_api.engine.runners.edited_attention import AttentionEdit
    from transformers_api.engine.runners.edited_modules import ModuleEdit
    from transformers_api.engine.runners.model_runner import Runner, VerifiedRunner
    from transformers_api.engine.sampling.sampler import TokenSampler
    from transformers_api.engine.stored_weights import StoredWeights


class BackendRefused(Exception):
    """The reason why a backend does not run a model."""


class PlanOutdated(BackendRefused):
    """A plan on the disk that does not fit its model. ``instead``: the backend without plans."""

    def __init__(self, reason: str, instead: Backend | None = None) -> None:
        super().__init__(reason)
        self.instead = instead


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Figures of a token and of the distribution that it is from."""

    logprob: float
    entropy: float  # in nats
    rank: int  # how many tokens are likelier
    ids: Sequence[int]  # the likeliest tokens, the likeliest first
    probs: Sequence[float]  # theirs


class Backend(Protocol):
    """One way to run models on one device. On the engine thread."""

    title: str  # in log lines: "runs without …"
    has_own_threads: bool  # torch leaves the cores to it
    is_batch_invariant: bool  # no bit depends on company, nor on how many tokens a pass reads
    runs_modules: bool  # a pass calls the model's modules; else observers are shown what it did
    leaves_model: bool  # a model that it refused can be given to the next backend

    def load_dtype(self, dtype: str) -> str:
        """Return the dtype to load with where ``dtype`` is requested; "stored": the file's."""
        ...

    def fill(self, model: Any, stored: StoredWeights, dtype: torch.dtype) -> None:
        """Give a model its weights, whose parameters are all empty."""
        ...

    def weight_dtype(self, dtype: str, stored: str, stored_bytes: int) -> str:
        """Return the dtype that weights of a file have in memory."""
        ...

    def file_bytes(self, types: Mapping[str, int], dtype: str) -> int:
        """Return the bytes that quantised weights of files take: see ModelFiles.file_types.

        ``dtype``: of those that become numbers.
        """
        ...

    def refusal(self, model: Any) -> str | None:
        """Return the reason why this model cannot be run; None where nothing speaks against it."""
        ...

    def verified_runner(self, model: Any, vocab_size: int, window: int) -> VerifiedRunner:
        """Return a runner that gives the model's own logits, which has been checked.

        ``window``: tokens of a sequence. The model may be changed. Raises BackendRefused.
        """
        ...

    def sampler(self) -> TokenSampler:
        """Return what draws the tokens."""
        ...

    def describe(self, runner: VerifiedRunner) -> EngineFacts:
        """Return the facts of a model that is run."""
        ...

    def token_stats(self, logits: Tensor, token: int, count: int) -> TokenStats | None:
        """Return the figures of ``token`` under ``logits`` (V,), with the ``count`` likeliest.

        None: the backend has no way of its own.
        """
        ...

    def observing_attention(self, layers: Collection[int] | None) -> AbstractContextManager[None]:
        """While it lasts, passes of observed sequences show the attention of these layers.

        None: of all. Where ``runs_modules`` all are shown anyway.
        """
        ...

    def noting_attention(
        self, places: Mapping[int, tuple[int, ...]]
    ) -> AbstractContextManager[Mapping[int, tuple[Tensor, Tensor | None]]]:
        """While it lasts, passes note what the last tokens of sequences attend to.

        ``places``: of sequences by layer, counted by slots from the first of the pass. By layer,
        once a pass has ended: their probabilities (B, H, S), and those of the sinks (B, H). A layer
        that is not there is shown to those who observe it.
        """
        ...

    def editing(
        self, model: Any, edits: Sequence[ModuleEdit], attention: Sequence[AttentionEdit] = ()
    ) -> AbstractContextManager[None]:
        """While it lasts, passes are changed by ``edits``, one for each module and side.

        And by those of ``attention``, one for each layer and sequence.
        """
        ...

    def attention_probs(
        self,
        mask: Any,
        query: Tensor,
        key: Tensor,
        sequence: int,
        queries: range,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return probabilities (H, R, S) of ``queries`` of one sequence, and of the sinks (H, R).

        ``query`` (B, H, T, D), ``key`` (B, G, S, D) and ``options`` as the attention function got
        them, with its ``mask``. None: recompute them with torch.
        """
        ...

    def numbers_of(self, states: Tensor) -> Tensor:
        """Return keys or values (…, S, D) of the cache, as the attention function got them."""
        ...

    def standby(self, runner: Runner) -> StandbyModel | None:
        """Return what can be kept of a model once it is unloaded; None: nothing."""
        ...

"""From a registry entry to an encoder: one that makes vectors, or one that scores pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers_api.engine.load_options import DTYPE_BYTES, LoadOptions, plain_numbers
from transformers_api.model_loader import ModelLoader
from transformers_api.serving.models.encoder_files import read_encoder, reads_sigmoid
from transformers_api.serving.models.preflight import MODULES
from transformers_api.serving.models.spec import ModelFiles, ModelSpec
from transformers_api.serving.swap.loaded_model import Embedder, PairScorer
from transformers_api.tokenizer_loader import LoadedTokenizer, lowercase

if TYPE_CHECKING:
    from transformers_api.engine.base import Engine
    from transformers_api.inspection.base import Inspector


class EncoderLoader(ModelLoader):
    """The same for encoders of both kinds, which nobody quantises."""

    def _placement(self, spec: ModelSpec) -> LoadOptions:
        return replace(super()._placement(spec), quantization="none")

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        """See Loader."""
        files = self.store.prepare(spec, progress)
        reader = reads_sigmoid if spec.encoder == "cross_encoder" else read_encoder
        reader(files.folder)  # a file that we cannot use: before anything is loaded
        return files

    def _options(
        self, spec: ModelSpec, files: ModelFiles, tokenizer: LoadedTokenizer
    ) -> LoadOptions:
        makes_scores = spec.encoder == "cross_encoder"
        limits = (
            spec.max_context_tokens,
            None if makes_scores else read_encoder(files.folder).max_tokens,
            tokenizer.tokenizer.model_max_length,  # enormous where it says nothing
        )
        options = super()._options(spec, files, tokenizer)
        longest = min(limit for limit in limits if limit is not None)
        return replace(options, max_context_tokens=longest)

    def _weight_bytes(self, spec: ModelSpec, files: ModelFiles) -> int:
        from transformers_api.engine.native.encoder import encoder_library, encoder_numbers

        options = self._placement(spec)
        device, threads = self.thread.call(lambda: self._pick_device(spec)).result(), self.thread
        dtype = options.dtype
        if self.thread.call(
            lambda: encoder_library(options, device, threads.num_threads) is not None
        ).result():
            stored = files.stored_dtype
            stored = plain_numbers(files.file_types) if stored == "gguf" else stored
            dtype = encoder_numbers(options.dtype, stored) or dtype
        elif dtype == "auto" and device != "cpu":
            dtype = files.stored_dtype
        return files.parameters * DTYPE_BYTES.get(dtype, 4)

    def _load_engine(
        self, spec: ModelSpec, files: ModelFiles, options: LoadOptions
    ) -> tuple[Engine, Inspector | None]:
        from transformers_api.engine.encoder import load_encoder

        with_head = spec.encoder == "cross_encoder"
        return load_encoder(files.folder, options, self.thread, with_head=with_head), None

    def _scorer(self, spec: ModelSpec, files: ModelFiles, engine: Engine) -> PairScorer | None:
        if spec.encoder != "cross_encoder":
            return None
        from transformers_api.engine.cross_encoder import CrossEncoder

        slice_tokens = self.settings.prefill_chunk
        return CrossEncoder(engine, slice_tokens, sigmoid=reads_sigmoid(files.folder))

    def _embedder(self, spec: ModelSpec, files: ModelFiles, engine: Engine) -> Embedder | None:
        if spec.encoder == "cross_encoder":
            return None
        facts = read_encoder(files.folder)
        return self._pooled(engine, facts.pooling, facts.steps, reads_in_chunks=False)

    def _tokenizer(self, spec: ModelSpec, files: ModelFiles) -> LoadedTokenizer:
        tokenizer = super()._tokenizer(spec, files)
        if spec.encoder == "encoder" and read_encoder(files.folder).lowercase:
            lowercase(tokenizer.tokenizer)
        return tokenizer

    def _text_use(self, files: ModelFiles) -> dict[str, Any]:
        if not (files.folder / MODULES).is_file():
            return {}
        facts = read_encoder(files.folder)
        return {
            "prompts": facts.prompts,
            "pools_prompts": facts.pooling.include_prompt,
            "similarity": facts.similarity,
        }

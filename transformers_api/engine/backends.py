"""The backends for a load, the fastest first."""

from __future__ import annotations

from collections.abc import Callable

from transformers_api.engine.backend import Backend
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.native.backend import NativeBackend
from transformers_api.engine.native.installation import provider
from transformers_api.engine.pretrained import pick_device
from transformers_api.engine.runners.torch_backend import CudaGraphsBackend, TorchBackend
from transformers_api.errors import ModelLoadFailed

ALWAYS_NATIVE = {"int8", "int4"}  # quantised by the kernels alone


def choose_backends(options: LoadOptions, device: str, threads: int | None) -> list[Backend]:
    """Return the backends that may run a model on ``device``.

    ``threads``: of the kernels; None: as many as there are cores. Where weights
    are quantised the kernels are waited for. Raises ModelLoadFailed where they cannot be had.
    """
    backend = TorchBackend(device, options)
    quantizes = options.quantization in ALWAYS_NATIVE
    # As numbers they take several times as much memory.
    waits = options.quantization not in ("auto", "none") or options.kv_cache_dtype != "auto"
    if device != "cpu":
        reason = "it is for CPUs"
    elif options.native is None:
        reason = "it needs NATIVE_KERNELS=true"
    else:
        kernels = provider(options.native, threads, options.native_isa)
        library = kernels.library(wait=waits)
        reason = kernels.why_not
        if library is not None:
            native = NativeBackend(library, options)
            return [native] if quantizes else [native, backend]
    if quantizes:
        raise not_quantized(options, reason)
    if device.startswith("cuda"):
        return [CudaGraphsBackend(device, options), backend]
    return [backend]


def not_quantized(options: LoadOptions, reason: str) -> ModelLoadFailed:
    """Return the error of a model that cannot have the quantisation it was to have."""
    return ModelLoadFailed(
        f"The model cannot be loaded with quantization {options.quantization}: {reason}",
        param="quantization",
    )


def when_compiled(options: LoadOptions, threads: int | None, callback: Callable[[], None]) -> None:
    """Call back once, from any thread, when kernels that a load would lack now are compiled."""
    if options.native is not None and pick_device(options.device) == "cpu":
        kernels = provider(options.native, threads, options.native_isa)
        if kernels.library() is None:
            kernels.when_compiled(callback)

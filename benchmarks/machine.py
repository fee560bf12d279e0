"""The machine that something is measured on, and the models that are measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from transformers_api.config.settings import Settings
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import WeightMemory
from transformers_api.serving.models.builtin import builtin_models
from transformers_api.serving.models.preflight import weight_files
from transformers_api.serving.models.store import ModelStore

DEFAULT_MODEL = "smollm2-135m-instruct"
SLEEPLESS = "import os; os.sched_setaffinity(0, {core}); print(flush=True)\nwhile True: pass"


def processor() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)


def machine() -> str:
    """Processor, cores, memory and the versions of what we stand on."""
    return (
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, {memory_gib():.0f} GiB; "
        f"torch {importlib.metadata.version('torch')}, "
        f"transformers {importlib.metadata.version('transformers')}, "
        f"Python {platform.python_version()}"
    )


def today() -> str:
    """The date of a measurement."""
    return time.strftime("%Y-%m-%d")


def read_gb_per_s(library: Library, rounds: int = 5) -> float:
    """How fast all cores read half a gigabyte in huge pages; the faster of two ways, at its best.

    One is torch's sum. The other is a product with one row, which fetches ahead of time what it
    reads: some processors do little of that by themselves.
    """
    weight = PackedWeight(library, [torch.ones(1 << 17, 2048)], "bfloat16", WeightMemory())
    row, numbers = torch.ones(1, 2048), weight.memory.view(torch.float32)
    times = []
    for read in [lambda: weight.multiply(row), numbers.sum] * rounds:
        began = time.perf_counter()
        read()
        times.append(time.perf_counter() - began)
    return 1e-9 * weight.nbytes / min(times)


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another process that never sleeps, on the first core that we may use."""
    core = {min(os.sched_getaffinity(0))}
    command = [sys.executable, "-c", SLEEPLESS.format(core=core)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        yield
    finally:
        other.kill()
        other.communicate()


def default_model_folder() -> Path:
    """The embedded model as safetensors, which peers read too, made on first use."""
    settings = Settings.from_env()
    spec = next(spec for spec in builtin_models() if spec.name == DEFAULT_MODEL)
    folder = settings.model_store.absolute() / "benchmarks" / DEFAULT_MODEL
    if not (folder / "model.safetensors").is_file():
        store = ModelStore(settings)
        (source,) = weight_files(store.prepare(spec, lambda _share, _what: None).folder)
        command = [sys.executable, "-m", "transformers_api.checkpoints.convert"]
        subprocess.run([*command, str(source), str(folder)], check=True, capture_output=True)
    return folder


def build_gpt2(folder: Path) -> Path:
    """A model of GPT-2's size (124M) with random weights, its tokenizer and a chat template."""
    from transformers import AutoModelForCausalLM, GPT2Config

    from transformers_api.checkpoints.tokenizers import make

    if (folder / "model.safetensors").is_file():
        return folder
    torch.manual_seed(0)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model: Any = AutoModelForCausalLM.from_config(GPT2Config(), dtype=torch.bfloat16)
    model.save_pretrained(partial)
    make("gpt2-instruct", partial, model.config.vocab_size, False).save_pretrained(partial)
    partial.rename(folder)
    return folder


def model_folder(name: str, scratch: Path) -> Path:
    """``smollm2``, ``gpt2`` (random weights, made in ``scratch``), or a folder of your own."""
    if name == "smollm2":
        return default_model_folder()
    if name == "gpt2":
        scratch.mkdir(parents=True, exist_ok=True)
        return build_gpt2(scratch / "gpt2-124m")
    folder = Path(name).absolute()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} is neither smollm2, gpt2 nor a model's folder")
    return folder

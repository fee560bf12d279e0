"""The recorded checkpoints of the original systems and what those systems made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures"


@dataclass(frozen=True)
class Original:
    """One fixture: its checkpoint and its recordings."""

    checkpoint: Path
    family: str
    model_class: str

    @property
    def folder(self) -> Path:
        return self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent

    @property
    def recorded(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "reference.safetensors")


ORIGINALS = {
    "tinygpt": Original(
        FIXTURES / "tinygpt/public/final_model_weights.pt", "tinygpt", "TinyGPTForCausalLM"
    ),
    "tinygpt-moe": Original(
        FIXTURES / "tinygpt-moe/public/final_model_moe.pt", "tinygpt-moe", "TinyGPTForCausalLM"
    ),
    "tinygpt2": Original(
        FIXTURES / "tinygpt2/public/sft_epoch1.pth", "tinygpt2", "TinyGPT2ForCausalLM"
    ),
    "niels-v1": Original(FIXTURES / "niels_v1/public/best.pt", "niels-v1", "NielsForCausalLM"),
    "niels-v1-chat": Original(FIXTURES / "niels_v1/chat/best.pt", "niels-v1", "NielsForCausalLM"),
    "niels-v2": Original(FIXTURES / "niels_v2/public/best.pt", "niels-v2", "NielsForCausalLM"),
    "gpt3dev": Original(FIXTURES / "gpt3dev/public", "gpt3dev", "GPT2LMHeadModel"),
}
PUBLIC = [name for name in ORIGINALS if name != "niels-v1-chat"]  # those with recorded ids
TINYGPT = ["tinygpt", "tinygpt-moe", "tinygpt2"]
NIELS = ["niels-v1", "niels-v1-chat", "niels-v2"]
SLIDING = ["tinygpt", "tinygpt-moe", "niels-v1", "niels-v2"]

"""The kernels for ARM, emulated: the bits of the same sources on x86, which all other tests pass."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from tests.kernels.conftest import SIMDE, STAND_INS, driven
from transformers_api.kernels.variants import VARIANTS

CROSS = "aarch64-linux-gnu-g++"
TOOLS = (CROSS, "qemu-aarch64", "g++")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
MISSING += [] if SIMDE.exists() else [str(SIMDE)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
@pytest.mark.parametrize("name", ["neon", "neon_bf16"])
def test_an_emulated_arm_gives_the_bits_of_its_stand_in(tmp_path, name):
    (stand_in,) = (variant for variant in STAND_INS if variant.name == f"{name}_on_x86")
    (neon,) = (variant for variant in VARIANTS if variant.name == name)
    ours = driven(["g++"], stand_in, tmp_path)
    theirs = driven([CROSS], neon, tmp_path, ["qemu-aarch64", "-cpu", "max"])
    assert len(ours) > 50_000
    assert hashlib.sha256(theirs).hexdigest() == hashlib.sha256(ours).hexdigest()

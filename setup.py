"""The compiled kernels in the wheel; all else stands in pyproject.toml.

Where there is a compiler, the wheel holds the kernels of every instruction set and is for this
kind of machine; where there is none, it is for any, and the server compiles them when it can. With
ziglang (`make wheel`) they need no newer C library than that of Debian 10, and `WHEEL_MACHINE` and
`WHEEL_SYSTEM` make a wheel for another kind of machine or system: see kernels/platforms.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from transformers_api.kernels import build as kernels
from transformers_api.kernels.variants import NativeUnavailable, platform_of

try:
    TARGET = platform_of(*(os.environ.get(name, "") for name in ("WHEEL_SYSTEM", "WHEEL_MACHINE")))
    COMPILER = kernels.find_compiler(portable=True, target=TARGET)
except NativeUnavailable as error:
    COMPILER = None
    sys.stderr.write(f"The wheel will have no kernels: {error}\n")


class BuildWithKernels(build_py):
    """The modules, then the libraries beside the kernels' sources."""

    def run(self) -> None:
        """Compile them into the folder that the wheel is made of."""
        super().run()
        if COMPILER is not None and not self.editable_mode:
            folder = Path(self.build_lib, "transformers_api", "kernels", "lib")
            kernels.build_for_package(folder, TARGET)


class WheelWithKernels(bdist_wheel):
    """A wheel for one kind of machine and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The middle of its name."""
        python, abi, machine = super().get_tag()
        if COMPILER is None:
            return python, abi, machine
        return "py3", "none", kernels.wheel_platform(COMPILER, TARGET)


class Platform(Distribution):
    """What is for one kind of machine."""

    def has_ext_modules(self) -> bool:
        """True where the kernels are in it, although Python imports none of them."""
        return COMPILER is not None


setup(distclass=Platform, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})

"""Builds the C++ core `dinofast._C`. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import sys
from glob import glob

import pybind11
from setuptools import Extension, setup

# errno and trapping math keep loops with a condition from being vectorized; nothing here relaxes
# the arithmetic itself.
flags = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp-simd",
]
# Apple's compiler has no OpenMP: one thread there
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]

core = Extension(
    "dinofast._C",
    sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/cpu/*.h")),
    include_dirs=[pybind11.get_include()],
    extra_compile_args=flags + openmp,
    extra_link_args=openmp,
    language="c++",
    # without a compiler the package installs all the same, and `dinofast doctor` says what is
    # missing
    optional=True,
)

setup(ext_modules=[core])

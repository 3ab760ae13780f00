"""Strict settings for every test, made before JAX starts: eight virtual devices and no silent rank promotion."""

import importlib.metadata
import os

import hypothesis

from tests.cache import share_compiled_programs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Programs run for a moment only. Without LLVM's optimizations they compile in half the time, without MLIR in half of that.
# With `XLA_FLAGS= pytest` the tests run what users run; CI does so with the newest JAX.
_SOONER = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # JAX 0.12 does not have it, and would end at once
    _SOONER.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_SOONER))
share_compiled_programs()

# Compiling takes longer than hypothesis likes an example to take, and a random seed would make failures come and go.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

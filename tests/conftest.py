"""Strict settings for every test, made before JAX starts: eight virtual devices and no silent rank promotion."""

import os

import hypothesis

from tests.cache import share_compiled_programs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
share_compiled_programs()

# Compiling takes longer than hypothesis likes an example to take, and a random seed would make failures come and go.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """In the first tier programs run for a moment only: without LLVM's optimizations they compile in half the time.

    The slow tests, and those of the library with other versions, run what users run.
    """
    flag = "--xla_backend_optimization_level=0"
    if config.option.markexpr == "not slow" and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

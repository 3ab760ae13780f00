"""Strict settings for every test, made before JAX starts: eight virtual devices and no silent rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import hypothesis

# Compiling takes longer than hypothesis likes an example to take, and a random seed would make failures come and go.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

"""Distillation of language models with and without DOT: `python -m examples.language_model`."""

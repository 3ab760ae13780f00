"""Distillation losses in Optax's conventions: one value per example, no reduction, and never below zero by rounding."""

from dot_optax.losses._logits import kd_loss as kd_loss

__all__ = ["kd_loss"]

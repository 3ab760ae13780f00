"""Distillation losses in Optax's conventions: one value per example, no reduction, and never below zero by rounding.

Of logits:         `kd_loss`, `reverse_kl_loss`, `jeffreys`, `jsd_loss`, `skew_kl_loss`, `dist_loss`, `bernoulli_kd_loss`
... in two parts:  `tckd_loss`, `nckd_loss`, `dkd_loss`, `dkd_warmup`, `deepkd_losses`, `top_k_mask`, `top_k_schedule`
Of many tokens:    `top_k_kd_loss`, `chunked_kd_loss`
Before any:        `standardize_logits`
Of features:       `feature_loss`, `attention_transfer_loss`, `similarity_loss`, `crd_loss`, `crd_init`, `crd_negatives`

Optax has what needs no teacher: `optax.smooth_labels`, and `optax.losses.softmax_cross_entropy` for soft labels.
"""

from dot_optax.losses._decoupled import deepkd_losses as deepkd_losses
from dot_optax.losses._decoupled import dkd_loss as dkd_loss
from dot_optax.losses._decoupled import dkd_warmup as dkd_warmup
from dot_optax.losses._decoupled import nckd_loss as nckd_loss
from dot_optax.losses._decoupled import tckd_loss as tckd_loss
from dot_optax.losses._decoupled import top_k_mask as top_k_mask
from dot_optax.losses._decoupled import top_k_schedule as top_k_schedule
from dot_optax.losses._features import CRDState as CRDState
from dot_optax.losses._features import attention_transfer_loss as attention_transfer_loss
from dot_optax.losses._features import crd_init as crd_init
from dot_optax.losses._features import crd_loss as crd_loss
from dot_optax.losses._features import crd_negatives as crd_negatives
from dot_optax.losses._features import feature_loss as feature_loss
from dot_optax.losses._features import similarity_loss as similarity_loss
from dot_optax.losses._logits import bernoulli_kd_loss as bernoulli_kd_loss
from dot_optax.losses._logits import dist_loss as dist_loss
from dot_optax.losses._logits import jeffreys as jeffreys
from dot_optax.losses._logits import jsd_loss as jsd_loss
from dot_optax.losses._logits import kd_loss as kd_loss
from dot_optax.losses._logits import reverse_kl_loss as reverse_kl_loss
from dot_optax.losses._logits import skew_kl_loss as skew_kl_loss
from dot_optax.losses._logits import standardize_logits as standardize_logits
from dot_optax.losses._tokens import chunked_kd_loss as chunked_kd_loss
from dot_optax.losses._tokens import top_k_kd_loss as top_k_kd_loss

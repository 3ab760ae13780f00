"""Knowledge distillation for JAX with one momentum per loss.

Optimizers:        `dot`, for transformers `dot_adamw`, `deepkd`; the baseline to compare with: `gain_matched_sgd`
Their parts:       `scale_by_dot`, `scale_by_dot_adam`; for any number of losses `scale_by_momenta`, `scale_by_adam_momenta`
Their momenta:     `betas`, `gains`
Gradients:         `value_and_grads`, `reached`; for Flax NNX those of `dot_optax.nnx`
... sampled:       `sampled_losses`, `sampled_examples`, `sampled_difference`: fewer teacher calls and backward passes
Losses:            `losses`: of logits (`losses.kd_loss` and relatives), of large vocabularies, of features
Angles of losses:  `aggregate` with one of `weightings`: a weighted sum against conflicts between the gradients
Algebra of losses: `PerLoss`, `DeepKDLosses`, `per_loss`, `joint`, `sum_losses`, `wrap`
Many devices:      `average_over`
What happens:      `diagnostics`: angles, shares and noise of the gradients, effective learning rates, landscapes, curvature

Start with `help(dot_optax.dot)`.
"""

from dot_optax import diagnostics as diagnostics
from dot_optax import losses as losses
from dot_optax import weightings as weightings
from dot_optax._aggregate import aggregate as aggregate
from dot_optax._algebra import joint as joint
from dot_optax._algebra import per_loss as per_loss
from dot_optax._algebra import sum_losses as sum_losses
from dot_optax._algebra import wrap as wrap
from dot_optax._containers import PerLoss as PerLoss
from dot_optax._dot import DeepKDLosses as DeepKDLosses
from dot_optax._dot import betas as betas
from dot_optax._dot import deepkd as deepkd
from dot_optax._dot import dot as dot
from dot_optax._dot import dot_adamw as dot_adamw
from dot_optax._dot import gain_matched_sgd as gain_matched_sgd
from dot_optax._dot import gains as gains
from dot_optax._dot import scale_by_dot as scale_by_dot
from dot_optax._dot import scale_by_dot_adam as scale_by_dot_adam
from dot_optax._gradients import value_and_grads as value_and_grads
from dot_optax._momenta import scale_by_adam_momenta as scale_by_adam_momenta
from dot_optax._momenta import scale_by_momenta as scale_by_momenta
from dot_optax._parallel import average_over as average_over
from dot_optax._reach import reached as reached
from dot_optax._sampling import sampled_difference as sampled_difference
from dot_optax._sampling import sampled_examples as sampled_examples
from dot_optax._sampling import sampled_losses as sampled_losses

__version__ = "0.1.0"  # pyproject.toml reads it here

"""Knowledge distillation for JAX with one momentum per loss."""

from dot_optax import losses as losses
from dot_optax._dot import betas as betas
from dot_optax._dot import dot as dot
from dot_optax._dot import scale_by_dot as scale_by_dot
from dot_optax._gradients import reached as reached
from dot_optax._gradients import value_and_grads as value_and_grads
from dot_optax._per_loss import PerLoss as PerLoss
from dot_optax._per_loss import joint as joint
from dot_optax._per_loss import per_loss as per_loss
from dot_optax._per_loss import sum_losses as sum_losses
from dot_optax._per_loss import wrap as wrap

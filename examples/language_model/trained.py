"""Networks that this program has trained: their folder says of what architecture they are, and whose tokens they know.

graphdef, params = trained.load(epath.Path("runs/bytes/dot"))
logits = model.apply(graphdef, params, tokens, separator=0)
"""

from typing import Any

import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.typing import DTypeLike

from examples.language_model import model
from examples.language_model.model import Architecture, Llama3Scaling
from examples.language_model.tokenizer import Tokenizer
from examples.trainer import checkpoint, records
from examples.trainer.errors import UserError


def description(of: Architecture, tokens: Tokenizer) -> records.Record:
    """What `result.json` says of a network."""
    return {"architecture": of._asdict(), "tokenizer": tokens.fingerprint}


def architecture(job_dir: epath.Path) -> Architecture:
    """The architecture of a network that was trained to the end."""
    return _described(job_dir)[0]


def check_tokenizer(job_dir: epath.Path, tokens: Tokenizer, remedy: str) -> None:
    """Raises if a network was trained on the tokens of another tokenizer."""
    if _described(job_dir)[1] != tokens.fingerprint:
        raise UserError(f"the network in {job_dir} was trained with another tokenizer; {remedy}")


def load(job_dir: epath.Path, dtype: DTypeLike = jnp.float32) -> tuple[nnx.GraphDef, Any]:
    """Returns (graphdef, params) of a network that was trained to the end, for `model.apply`.

    Args:
        job_dir: WORKDIR/teacher or WORKDIR/METHOD.
        dtype: what it is to compute in.

    Raises:
        UserError: if there is no such network.
    """
    of = architecture(job_dir)
    graphdef, _ = model.split(nnx.eval_shape(lambda: model.build(of, dtype=dtype, rngs=nnx.Rngs(0))))
    return graphdef, checkpoint.load_variables(job_dir)[0]


def _described(job_dir: epath.Path) -> tuple[Architecture, str]:
    path = job_dir / "result.json"
    record = records.read_json(path)
    try:
        of = Architecture(**record["architecture"])
        scaling = of.rope_scaling and Llama3Scaling(*of.rope_scaling)
        return of._replace(rope_scaling=scaling), record["tokenizer"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not say of what architecture the network is") from error

"""Llamas of `transformers`, in PyTorch, to compare those of `examples.language_model` with.

    python -m tests.reference.transformers_llama [FILE.gguf]    (FILE needs pip install accelerate)

prints the largest deviation of the logits of small random networks in both formats, and then of FILE, on a text of 200
tokens. `tests/examples/test_language_model_pretrained.py` asserts the former.
"""

import functools
import pathlib
import sys
import tempfile

import jax
import numpy as np
import torch
import transformers
from etils import epath
from flax import nnx

from examples.language_model import model
from examples.language_model.pretrained import open_pretrained
from tests import llama_files
from tests.llama_files import ARCHITECTURES


def load(folder, **options):
    """The network in a folder, in float32; of a GGUF file with `gguf_file=NAME`."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(network, tokens):
    """Its logits [batch, length, vocabulary] of integer tokens [batch, length]."""
    with torch.no_grad():
        return network(torch.tensor(tokens)).logits.numpy()


def ours(path, tokens):
    """Those of `examples.language_model`, of tokens without separators."""
    found = open_pretrained(epath.Path(path))
    graphdef, _ = model.split(nnx.eval_shape(lambda: model.build(found.architecture, rngs=nnx.Rngs(0))))
    return jax.jit(functools.partial(model.apply, graphdef, separator=0))(found.load(), tokens)


def random_tokens(vocabulary):
    return np.random.default_rng(0).integers(2, vocabulary, (2, 40))


def main(argv):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, largest deviation of the logits\n")
    print(f"{'':12}  size of logits  safetensors     GGUF")
    with tempfile.TemporaryDirectory() as root:
        for name, architecture in ARCHITECTURES.items():
            weights, folder = llama_files.tensors(architecture), pathlib.Path(root) / name
            llama_files.write_folder(folder, architecture, weights)
            gguf = llama_files.write_gguf(folder / "network.gguf", architecture, weights)
            tokens = random_tokens(architecture.vocabulary)
            wanted = logits(load(folder), tokens)
            off = [np.abs(ours(path, tokens) - wanted).max() for path in (folder, gguf)]
            print(f"{name:12}  {np.abs(wanted).max():14.2f}  {off[0]:11.1e}  {off[1]:7.1e}")
    for argument in argv:
        path = pathlib.Path(argument)
        text = pathlib.Path(transformers.__file__).with_name("activations.py").read_bytes()
        tokens = open_pretrained(epath.Path(path)).tokenizer.encode([text])[0][None, :200].astype(np.int32)
        wanted = logits(load(path.parent, gguf_file=path.name), tokens)
        print(
            f"\n{path.name}: {np.abs(ours(path, tokens) - wanted).max():.1e}, of logits up to {np.abs(wanted).max():.1f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])

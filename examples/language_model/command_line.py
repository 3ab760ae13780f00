"""Usage: python -m examples.language_model --config=NAME --workdir=FOLDER --config.FIELD=VALUE

NAME is a file in examples/language_model/configs/ (default: bytes) or the path of a .py file with `get_config()`; FOLDER
defaults to runs/NAME. Every field of the config can be overridden, for example --config.optimizer.learning_rate=3e-4.

On several hosts, start the same command on each, with --distributed on TPU pods and under SLURM or GKE, which say by
themselves what belongs together; elsewhere with --coordinator=HOST:PORT --num_processes=N --process_id=I, where HOST runs
process 0. FOLDER, the texts and the teacher must be the same for all. When a host dies the others end, after about
--heartbeat_timeout=60 seconds (5 or more) at the latest; start the same command again on each, and they go on.
"""

from collections.abc import Sequence
from pathlib import Path

from examples.trainer import command_line
from examples.trainer.command_line import Arguments


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    return command_line.main(_PROGRAM, argv)


def parse(argv: Sequence[str]) -> Arguments:
    """Reads a command line."""
    return command_line.parse(_PROGRAM, argv)


def _run(arguments: Arguments) -> None:
    from examples.language_model import experiment

    experiment.run(arguments)


def _help() -> list[str]:
    from examples.distill import methods
    from examples.language_model import settings

    return [
        "\nMethods, one or more for --config.method, separated by commas:",
        *(f"  {method:<20} {methods.summary(method)}" for method in settings.known_methods()),
    ]


_PROGRAM = command_line.Program(
    name="examples.language_model",
    usage=str(__doc__),
    configs=Path(__file__).parent / "configs",
    default_config="bytes",
    help=_help,
    run=_run,
    has_smoke_test=False,
)

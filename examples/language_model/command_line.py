"""Usage: python -m examples.language_model --config=NAME --workdir=FOLDER --config.FIELD=VALUE

NAME is a file in examples/language_model/configs/ (default: bytes) or the path of a .py file with `get_config()`; FOLDER
defaults to runs/NAME. Every field of the config can be overridden, for example --config.optimizer.learning_rate=3e-4.
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

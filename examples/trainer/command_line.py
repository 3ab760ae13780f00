"""The command line of a program: which config, which overrides, which hosts; and errors as one line.

    python -m PROGRAM --config=NAME --workdir=FOLDER --config.FIELD=VALUE

NAME is a file in the program's folder of configs or the path of a .py file with `get_config()`; FOLDER defaults to
runs/NAME. Every field of the config can be overridden.
"""

import difflib
import logging
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from examples.trainer.errors import UserError, one_line
from examples.trainer.settings import fields

_HOST_FLAGS = ("distributed", "coordinator", "num_processes", "process_id", "heartbeat_timeout")
_ON_SEVERAL_HOSTS = """\
On several hosts, start the same command on each, with --distributed on TPU pods and under SLURM or GKE, which say by
themselves what belongs together; elsewhere with --coordinator=HOST:PORT --num_processes=N --process_id=I, where HOST runs
process 0. FOLDER and all that is read must be the same for all. When a host dies the others end, after about
--heartbeat_timeout=60 seconds (5 or more) at the latest; start the same command again on each, and they go on.
"""
_ANY_REST = "the same command goes on with whatever was saved"


class Program(NamedTuple):
    """A program whose command line this is."""

    name: str  # after `python -m`
    usage: str  # the first part of its help
    configs: Path
    default_config: str
    help: Callable[[], Sequence[str]]  # further lines of its help; may import JAX
    run: Callable[["Arguments"], None]  # imports whatever it needs: a mistyped flag need not wait for Flax and Orbax
    has_smoke_test: bool = True


class Arguments(NamedTuple):
    """A command line that was read."""

    config: ConfigDict  # with its overrides
    name: str  # of the config
    workdir: str
    smoke_test: bool
    hosts: dict[str, bool | str | int | None]  # the flags in `_HOST_FLAGS`


def main(program: Program, argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    # Before the imports below. TFDS logs hints for its developers; Orbax what it raises, too, and asyncio the rest of it.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        arguments = parse(program, argv)
        _join_hosts(**arguments.hosts)
        from examples.trainer.preemption import Preempted  # imports JAX

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            program.run(arguments)
        except Preempted as end:
            print("terminated;", str(end) or _ANY_REST, file=sys.stderr)
    except UserError as error:
        print("error:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted;", str(interrupt) or _ANY_REST, file=sys.stderr)
        return 130
    return 0


def parse(program: Program, argv: Sequence[str]) -> Arguments:
    """Reads a command line; with --help it prints the help and exits."""
    # Which fields can be overridden depends on which config is chosen: so the other flags come first.
    choice = flags.FlagValues()
    flags.DEFINE_string("config", program.default_config, "name or path of a config", flag_values=choice)
    flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and pictures", flag_values=choice)
    if program.has_smoke_test:
        flags.DEFINE_boolean("smoke_test", False, "try the config out, without its data", flag_values=choice)
    flags.DEFINE_boolean("help", False, "show how to use the program", short_name="h", flag_values=choice)
    flags.DEFINE_boolean("distributed", False, "join the other hosts of a cluster", flag_values=choice)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=choice)
    flags.DEFINE_integer("num_processes", None, "how many hosts there are", 1, 1_000_000, flag_values=choice)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", 0, flag_values=choice)
    flags.DEFINE_integer("heartbeat_timeout", 60, "seconds of a silent host's life", 5, 86_400, flag_values=choice)
    try:
        name, *overrides = choice([program.name, *argv], known_only=True)
        config = _load(program, choice.config)
        if choice.help:
            print(_help(program, config, choice.config))
            raise SystemExit(0)
        _check_fields(overrides, config)
        config_flag = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", config, flag_values=config_flag, sys_argv=overrides)
        unused = config_flag([name, *overrides])[1:]
    except flags.UnrecognizedFlagError as error:
        field = f"config.{error.flagname}"
        hint = f"; did you mean --{field}?" if error.flagname in fields(config) else ""
        raise UserError(f"{error}{hint}") from error
    except (flags.Error, ValueError) as error:
        raise UserError(str(error)) from error
    if unused:
        raise UserError(f"unexpected argument {unused[0]!r}")
    name = Path(choice.config).stem
    hosts = {flag: choice[flag].value for flag in _HOST_FLAGS}
    smoke_test = program.has_smoke_test and choice.smoke_test
    return Arguments(config_flag.config, name, choice.workdir or f"runs/{name}", smoke_test, hosts)


def _join_hosts(
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_timeout: int,
) -> None:
    """Connects this process to those on the other hosts, if there are any."""
    place = (coordinator, num_processes, process_id)
    if not distributed and place == (None, None, None):
        return
    if None in place and place != (None, None, None):
        raise UserError("give all of --coordinator, --num_processes and --process_id, or --distributed alone")
    if process_id is not None and process_id >= num_processes:
        raise UserError(f"bad --process_id={process_id}: it must be below --num_processes={num_processes}")
    import jax

    try:
        jax.distributed.initialize(*place, heartbeat_timeout_seconds=heartbeat_timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other hosts ({one_line(error, 200)}); where no cluster says which they are, give"
            " --coordinator, --num_processes and --process_id, and on a single host none of these"
        ) from error


def _load(program: Program, name: str) -> ConfigDict:
    path = os.path.expanduser(name) if name.endswith(".py") else str(program.configs / f"{name}.py")
    if not os.path.isfile(path) or os.path.basename(path).startswith("_"):
        known = ", ".join(_known_configs(program))
        raise UserError(f"there is no --config={name}; give the path of a .py file, or one of {known}")
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # The file may import others beside it.
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config and get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file of the user's raises
        raise UserError(f"--config={name} raises {_where(error, path)}") from error
    if get_config is None:
        raise UserError(f"--config={name} defines no get_config()")
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of --config={name} returns a {type(config).__name__}, not a ConfigDict")
    return config


def _where(error: BaseException, path: str) -> str:
    """An error and the line of the file that it comes from."""
    lines, traceback = [], error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == path:
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return f"{type(error).__name__}: {one_line(error, 300)}" + (f" (line {lines[-1]})" if lines else "")


def _check_fields(overrides: Sequence[str], config: ConfigDict) -> None:
    # ml_collections would refuse these fields too, but with the bare name for a message.
    known = fields(config)
    for field in re.findall(r"^--?(?:no)?config\.([^=\s]+)", "\n".join(overrides), re.MULTILINE):
        if known.get(field, field) is None:
            raise UserError(f"--config.{field} has no value in the config's file, and so no type: set it there")
        if field in known:
            continue
        inside = [name for name in known if name.startswith(f"{field}.")]
        if inside:
            raise UserError(f"--config.{field} is a section of the config; its fields: {', '.join(inside)}")
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"the config has no field {field!r}; {hint}")


def _help(program: Program, config: ConfigDict, name: str) -> str:
    return "\n".join(
        [
            program.usage,
            _ON_SEVERAL_HOSTS,
            f"Configs: {', '.join(_known_configs(program))}",
            *program.help(),
            f"\nFields of --config={name} and their defaults:",
            *(f"  --config.{field}={shlex.quote(str(value))}" for field, value in fields(config).items()),
        ]
    )


def _known_configs(program: Program) -> list[str]:
    return sorted(path.stem for path in program.configs.glob("[!_]*.py"))

"""Usage: python -m examples.distill --config=NAME --workdir=FOLDER --config.FIELD=VALUE

NAME is a file in examples/distill/configs/ (default: digits) or the path of a .py file with `get_config()`; FOLDER
defaults to runs/NAME. Every field of the config can be overridden, for example --config.optimizer.delta=0.05.

On several hosts, start the same command on each, with --distributed on TPU pods and under SLURM or GKE, which say by
themselves who belongs together; elsewhere with --coordinator=HOST:PORT --num_processes=N --process_id=I, where HOST runs
process 0. FOLDER and the dataset must be the same for all. When a host dies the others end, after about
--heartbeat_timeout=60 seconds (5 or more) at the latest; start the same command again on each, and they go on.
"""

import difflib
import logging
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from examples.distill import settings
from examples.distill.errors import UserError, one_line

_CONFIGS = Path(__file__).parent / "configs"
_ANY_REST = "the same command goes on with whatever was saved"


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    # Before the imports below. TFDS logs hints for its developers; Orbax what it raises, too, and asyncio the rest of it.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        config, name, directory = parse(argv)
        _join(argv)
        from examples.distill import experiment, preemption  # A mistyped flag need not wait for Flax and Orbax.

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            experiment.run(config, name, directory)
        except preemption.Preempted as end:
            print("terminated;", str(end) or _ANY_REST, file=sys.stderr)
    except UserError as error:
        print("error:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted;", str(interrupt) or _ANY_REST, file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str, Path]:
    """Returns the config with its overrides, its name, and the working directory as an absolute path."""
    # Two passes, each with flags of its own: which fields can be overridden depends on which config is chosen.
    choice = flags.FlagValues()
    flags.DEFINE_string("config", "digits", "name or path of a config", flag_values=choice)
    flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and pictures", flag_values=choice)
    flags.DEFINE_boolean("help", False, "show how to use the program", short_name="h", flag_values=choice)
    _define_hosts(choice)
    try:
        program, *overrides = choice(["examples.distill", *argv], known_only=True)
        config = _load(choice.config)
        if choice.help:
            print(_help(config, choice.config))
            raise SystemExit(0)
        _check_fields(overrides, config)
        fields = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", config, flag_values=fields, sys_argv=overrides)
        unused = fields([program, *overrides])[1:]
    except (flags.Error, ValueError) as error:
        raise UserError(str(error)) from error
    if unused:
        raise UserError(f"unexpected argument {unused[0]!r}")
    name = Path(choice.config).stem
    return fields.config, name, Path(choice.workdir or f"runs/{name}").absolute()


def _define_hosts(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("distributed", False, "join the other hosts of a cluster", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many hosts there are", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", 0, flag_values=values)
    flags.DEFINE_integer("heartbeat_timeout", 60, "seconds until a silent host counts as dead", 5, flag_values=values)


def _join(argv: Sequence[str]) -> None:
    """Connects this process to those on the other hosts, if there are any."""
    hosts = flags.FlagValues()
    _define_hosts(hosts)
    hosts(["examples.distill", *argv], known_only=True)
    given = (hosts.coordinator, hosts.num_processes, hosts.process_id)
    if not hosts.distributed and given == (None, None, None):
        return
    if None in given and given != (None, None, None):
        raise UserError("give all of --coordinator, --num_processes and --process_id, or --distributed alone")
    if hosts.process_id is not None and hosts.process_id >= hosts.num_processes:
        raise UserError(f"bad --process_id={hosts.process_id}: it must be below --num_processes={hosts.num_processes}")
    import jax

    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=hosts.heartbeat_timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other hosts ({one_line(error, 200)}); where no cluster says who they are, give --coordinator,"
            " --num_processes and --process_id, and on a single host none of these"
        ) from error


def _load(name: str) -> ConfigDict:
    path = Path(name) if name.endswith(".py") else _CONFIGS / f"{name}.py"
    if not path.is_file() or path.stem.startswith("_"):
        raise UserError(f"unknown config {name!r}; known: {', '.join(_known_configs())}, or the path of a .py file")
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise UserError(f"--config={name} defines no get_config()")
    return get_config()


def _check_fields(overrides: Sequence[str], config: ConfigDict) -> None:
    # ml_collections would refuse these fields too, but with the bare name for a message.
    known = settings.fields(config)
    for field in re.findall(r"^--?(?:no)?config\.([^=\s]+)", "\n".join(overrides), re.MULTILINE):
        if field in known:
            continue
        inside = [name for name in known if name.startswith(f"{field}.")]
        if inside:
            raise UserError(f"--config.{field} is a section of the config; its fields: {', '.join(inside)}")
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"the config has no field {field!r}; {hint}")


def _help(config: ConfigDict, name: str) -> str:
    from examples.distill import methods  # Imports JAX.

    return "\n".join(
        [
            str(__doc__),
            f"Configs: {', '.join(_known_configs())}",
            "\nMethods, one or more for --config.method, separated by commas:",
            *(f"  {method:<16} {str(make.__doc__).splitlines()[0]}" for method, make in methods.METHODS.items()),
            f"\nFields of --config={name} and their defaults:",
            *(f"  --config.{field}={shlex.quote(str(value))}" for field, value in settings.fields(config).items()),
        ]
    )


def _known_configs() -> list[str]:
    return sorted(path.stem for path in _CONFIGS.glob("[!_]*.py"))

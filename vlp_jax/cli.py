# SPDX-License-Identifier: Apache-2.0
"""The command line: flags, the config file with its dotted overrides, errors and exit codes, in one place.

A main is `define(flags)`, `main(flags)` and `sys.exit(cli.run(main, define, usage=...))`. Flags live in a
fresh `FlagValues` made inside `run`, so that importing a main defines nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before jax and tensorflow load their C++ parts, which read these once. What the user has set stands.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# tensorflow only reads data here. oneDNN makes RandAugment a fifth faster on one core, but two cores then give 1.5
# times the pictures instead of 1.9; it announces itself whatever the log level, and changes the bits by CPU.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags as absl_flags  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from vlp_jax.types import ENVIRONMENT, Stop, UserError, closest, exit_code  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent  # the folder that holds configs/
CLOSED = 141  # what a shell reports of a program whose reader has gone (128 + SIGPIPE)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "a tuple"}


def run(
    main: Callable[..., None],
    define: Callable[[absl_flags.FlagValues], None],
    *,
    usage: str,
    arguments: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the command line, calls `main(flags, *arguments)` and returns the exit code of DESIGN.md.

    Args:
        main: the work; results go to standard output, progress and logs to standard error.
        define: adds the flags of this main, and `define_config` where it reads a config.
        usage: what `--help` prints above the flags; its first line names the command.
        arguments: names of the positional arguments, all of them required, in capitals.
        argv: the command line after the program's name; `sys.argv[1:]` when not given.

    Returns:
        0 done or `--help`; 2 the user's input or environment is at fault; 1 ours, with a traceback; the code
        of a `Stop` (75 preempted, 77 hung, 130 Ctrl-C after saving); 130 Ctrl-C.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("vlp_jax").setLevel(logging.INFO)
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = absl_flags.FlagValues()
    flags.set_gnu_getopt(True)
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")
    try:
        define(flags)
        if any(word in ("--help", "-help", "-h", "--helpfull") for word in argv):
            print(_help(flags, usage, arguments), flush=True)
            return 0
        main(flags, *_parse(flags, argv, arguments))
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader has seen enough. What is still buffered must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except (UserError, Stop) as error:
        return _say(str(error), exit_code(error))
    except KeyboardInterrupt as error:
        return _say("Interrupted.", exit_code(error))
    except Exception as error:
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
            return _say("A path begins with ~NAME, but there is no such user. Write it out.", 2)
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            where = f": {error.filename}" if error.filename else ""
            message = f"{error.strerror}{where}. Free or choose another place, and start again."
            return _say(message, exit_code(error))
        traceback.print_exc()
        return exit_code(error)


def define_config(flags: absl_flags.FlagValues, default: str = "") -> None:
    """Adds `--config=FILE[:ARGUMENT]` and `--config.KEY=VALUE`; `flags.config` is then a locked ConfigDict.

    Without `--config` and default, `flags.config` is an empty ConfigDict: a main that needs one calls
    `require(flags, "config")`.
    """
    text = "configs/NAME.py:variant=... or the bare NAME; --config.KEY=VALUE changes a key"
    absl_flags.DEFINE_string("config", default, text, flag_values=flags)


def require(flags: absl_flags.FlagValues, *names: str) -> None:
    """Raises UserError for the first flag of `names` that is empty."""
    for name in names:
        if not flags[name].value:
            hint = f" Possible: {', '.join(config_names())}." if name == "config" else ""
            raise UserError(f"--{name} is missing.{hint} Give --{name}=...; --help shows all flags.")


def config_names() -> list[str]:
    """The names that `--config` knows without a path."""
    names = {path.stem for path in (ROOT / "configs").glob("*.py")}
    return sorted(names - {"__init__", "common"})


def load_config(value: str) -> ConfigDict:
    """Loads "configs/NAME.py:ARGUMENT" or "NAME:ARGUMENT", looked for here and then beside the package.

    Raises:
        UserError: no such file, or the file refuses the argument or fails.
    """
    name, colon, argument = value.partition(":")
    path = _find_config(name)
    # `from configs import common` must find the folder that this file lies in.
    home = str(path.parent.parent if path.parent.name == "configs" else ROOT)
    sys.path.insert(0, home)
    try:
        spec = importlib.util.spec_from_file_location(f"vlp_jax_config_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(argument) if colon else module.get_config()
    except ValueError as error:
        raise UserError(f"--config={value}: {error}") from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({line.filename}, line {line.lineno})"
        raise UserError(f"--config={value} does not load. {reason}. Mend that file.") from error
    finally:
        sys.path.remove(home)
    return config.lock()


def _find_config(name: str) -> Path:
    inside = Path(name).expanduser() if name.endswith(".py") else Path("configs") / f"{name}.py"
    places = [Path.cwd() / inside, ROOT / inside]
    for path in places:
        if path.is_file():
            return path.resolve()
    looked = ", ".join(dict.fromkeys(str(path) for path in places))
    hint, possible = closest(inside.stem, config_names()), ", ".join(config_names())
    raise UserError(
        f"No config file '{name}'.{hint} Looked for {looked}. Give a .py file or one of: {possible}."
    )


def _parse(flags: absl_flags.FlagValues, argv: list[str], arguments: Sequence[str]) -> list[str]:
    try:
        if "config" in flags:
            argv = _attach_config(flags, argv)
        values = flags([""] + argv)[1:]
    except absl_flags.UnrecognizedFlagError as error:
        possible = sorted(name for name in flags if "." not in name)
        name = error.flagname.split("=")[0]
        listed = ", ".join(f"--{known}" for known in possible) or "none"
        raise UserError(f"Unknown flag --{name}.{closest(name, possible)} Possible: {listed}.") from error
    except absl_flags.Error as error:
        raise UserError(_explain(flags, str(error))) from error
    if len(values) != len(arguments):
        wanted, given = (" ".join(some) or "none" for some in (arguments, values))
        raise UserError(f"Arguments without a flag: wanted {wanted}; given {given}. --help shows the usage.")
    return values


def _explain(flags: absl_flags.FlagValues, message: str) -> str:
    match = re.match(r"flag --([\w.]+)=(.*?): ", message, re.DOTALL)
    if match is None or match[1] not in flags:
        return message[:1].upper() + message[1:]
    name, value = match.groups()
    kind = KINDS.get(flags[name].flag_type(), "another type")
    bounds = (("from", "lower_bound"), ("to", "upper_bound"))
    limits = ((word, getattr(flags[name].parser, bound, None)) for word, bound in bounds)
    kind += "".join(f" {word} {limit}" for word, limit in limits if limit is not None)
    return f"--{name} does not take '{value}'. It takes {kind}, for example {flags[name].default!r}."


def _attach_config(flags: absl_flags.FlagValues, argv: list[str]) -> list[str]:
    """Loads the config, puts it in place of the string flag, and returns argv without `--config`."""
    value, rest = flags["config"].default, []
    words = iter(argv)
    for word in words:
        match = re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL)
        if match:
            value = _following(words, word) if match[1] is None else match[1]
        else:
            rest.append(word)
    config = load_config(value) if value else ConfigDict().lock()
    if not value and any(re.match(r"--?(no)?config\.", word) for word in rest):
        raise UserError(f"--config.KEY=... needs --config=NAME. Possible: {', '.join(config_names())}.")
    rest = list(_overrides(config, rest))
    delattr(flags, "config")
    config_flags.DEFINE_config_dict("config", config, flag_values=flags, sys_argv=rest)
    return rest


def _overrides(config: ConfigDict, argv: list[str]) -> Iterator[str]:
    """Yields argv with each `--config.KEY VALUE` checked and joined by `=`; ints may be given as 1e5."""
    words = iter(argv)
    for word in words:
        match = re.match(r"--?(no)?config\.([^=]*)(?:=(.*))?$", word, re.DOTALL)
        if not match:
            yield word
            continue
        negated, key, value = match.groups()
        current = _lookup(config, key)
        if isinstance(current, bool) and value is None:
            yield f"--config.{key}={'false' if negated else 'true'}"
            continue
        value = _following(words, word) if value is None else value
        yield f"--config.{key}={_as_integer(value) if type(current) is int else value}"


def _lookup(config: ConfigDict, key: str) -> object:
    node, above = config, "config"
    for name in key.split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"--config.{key}: {above} has no keys below it. Give --{above}=VALUE.")
        possible = ", ".join(sorted(node)) or "none"
        if name not in node:
            same = [path for path in _paths(config) if path.split(".")[-1] == key.split(".")[-1]]
            hint = f" Did you mean 'config.{same[0]}'?" if same else closest(name, node)
            raise UserError(f"--config.{key}: {above} has no key '{name}'.{hint} Possible: {possible}.")
        node, above = node[name], f"{above}.{name}"
    if isinstance(node, ConfigDict):
        raise UserError(
            f"--config.{key} is a group of keys. Give one of: {', '.join(sorted(node)) or 'none'}."
        )
    return node


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _as_integer(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value  # absl's integer parser refuses it by name
    return str(int(number)) if number.is_integer() and not re.fullmatch(r"[+-]?[\d_]+", value) else value


def _following(words: Iterator[str], flag: str) -> str:
    value = next(words, None)
    if value is None:
        raise UserError(f"{flag} has no value. Give {flag}=VALUE.")
    return value


def _help(flags: absl_flags.FlagValues, usage: str, arguments: Sequence[str]) -> str:
    lines = [*usage.strip().splitlines(), ""]
    if arguments:
        lines += [f"Arguments: {' '.join(arguments)}", ""]
    lines.append("Flags:")
    for name in flags:
        default = "" if flags[name].default in ("", None) else f" (default {flags[name].default})"
        lines.append(f"  --{name}  {flags[name].help}{default}")
    if "config" in flags:
        lines += ["", f"Configs: {', '.join(config_names())}. Keys and their meaning: configs/common.py."]
    # What is given as a list of lines stays one; a long line goes on further in.
    wrap = textwrap.TextWrapper(
        110, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(line if len(line) <= 120 else wrap.fill(line) for line in lines)


def _say(message: str, code: int) -> int:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    return code

"""The command line: `dinofast COMMAND [flags]`. Every flag is made from a field of the command's
options, and nowhere else is a flag spelled: the rest of the code names an option `like_this`, and
`main` turns that into --like_this.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from functools import partial
from typing import Any

from .. import __version__
from ..commands import COMMANDS, module_of
from ..config import Config, meant
from ..runtime.backends import CPU_TORCH
from ..runtime.suggestions import did_you_mean
from ..runtime.terminal import launched_rank, prepare_streams, printable, say
from ..runtime.words import spelling
from ..validation import in_words
from .arguments import Parser, check_dashes, number, one_of, truth, whole_number
from .foreign_flags import command_instead_of

_NEEDED = {
    "torch": "pip install torch, or on a machine without a GPU, where the CPU build is smaller, "
    + CPU_TORCH,
    "numpy": "pip install numpy",
    "PIL": "pip install pillow",
}
USAGE, INTERRUPTED = 2, 128  # exit codes; a signal's number is added to the second


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed midway, 2 a wrong option, path or file, 128
    + n ended by signal n."""
    # libgomp's threads spin while they wait. On few cores, or beside anything else that runs, they
    # take the time from each other and from the data workers: 25 instead of 246 images/s in the
    # demo on 2 shared cores (2026-11-23). Torch's import reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        say(parser().format_help().rstrip(), error=True)
        return USAGE
    options: type = Config
    try:
        argv = _as_flags(argv)
        command = _command_of(argv)
        options = module_of(command).Options if command else Config
        shows_defaults = command and {"-h", "--help"} & set(argv)
        given = vars(parser(command, _device() if shows_defaults else "cpu").parse_args(argv))
        run = module_of(given.pop("command")).run
        with spelling(partial(with_flags, options=options)), _warnings_as_lines():
            code = run(options_of(options, given, _usage(command or "", options)))
    except ValueError as error:
        return _say(f"dinofast: {with_flags(str(error), options)}", USAGE)
    except ImportError as error:
        if error.name not in _NEEDED:
            raise
        return _say(f"dinofast: {error.name} is not installed ({error}): {_NEEDED[error.name]}.", 1)
    except (OSError, RuntimeError) as error:
        from ..data.backend_pil import WorkerDied
        from ..runtime.progress import Diverged

        if not isinstance(error, Diverged | WorkerDied | OSError):
            raise  # a fault of ours, or of torch: the traceback is worth more
        return _say(f"dinofast: {with_flags(str(error), options)}", 1)
    except KeyboardInterrupt as error:  # `Interrupted`, or one in the middle of things
        return _say(
            str(error) or "dinofast: ended at once; what was last saved stands.",
            INTERRUPTED + getattr(error, "signum", signal.SIGINT),
        )
    return code or 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings of ours without the file and the line of code that they come from."""
    with warnings.catch_warnings():
        show, ours = warnings.showwarning, os.path.dirname(os.path.dirname(__file__))

        def tell(message: Any, category: Any, filename: str, *more: Any) -> None:
            if filename.startswith(ours):
                say(f"warning: {message}", error=True)
            else:
                show(message, category, filename, *more)

        warnings.showwarning = tell  # type: ignore[assignment]  # a file, a line number, a line
        yield


def _as_flags(argv: list[str]) -> list[str]:
    """`help`, `help pretrain`, `version` and -v, as other programs take them; without what
    python -m torch.distributed.launch writes before all words."""
    first, *rest = argv
    if rest and re.fullmatch(r"--local[-_]rank=\d+", first):
        return _as_flags(rest)
    if first in ("help", "-help", "-?", "/?"):
        return [*(word for word in rest[:1] if word in COMMANDS), "--help"]
    return ["--version"] if first in ("version", "-version", "-v", "-V") else argv


def _command_of(argv: list[str]) -> str | None:
    """The command, None where help or the version is asked for. Raises ValueError if there is no
    such."""
    check_dashes(argv)
    first = argv[0]
    if first in COMMANDS:
        return first
    if first in ("-h", "--help", "--version"):
        return None
    if first.startswith("-"):
        command = next((word for word in argv if word in COMMANDS), "COMMAND")
        raise ValueError(f"the command comes first: dinofast {command} ... {first} ...")
    if os.path.exists(first) or "/" in first:
        raise ValueError(
            f"'{first}' is a path, not a command: dinofast pretrain {shlex.quote(first)}"
        )
    way_out = command_instead_of(first) or did_you_mean(first, list(COMMANDS))
    raise ValueError(
        f"there is no command {printable(first)}.{way_out} Commands: {', '.join(COMMANDS)}."
    )


def _say(text: str, code: int) -> int:
    rank = launched_rank()
    if rank != "0" and code not in (1, USAGE):  # of an orderly stop one process speaks for all
        return code
    text = printable(text if rank == "0" else f"process {rank}: {text}", "\n")
    if code > INTERRUPTED and "TORCHELASTIC_RUN_ID" in os.environ:
        _say_after(os.getppid(), text)
    else:
        say(text, error=True)
    return code


def _say_after(launcher: int, text: str) -> None:
    """Once torchrun, which prints a traceback of its own when it is interrupted, has ended, if
    nobody has yet taken note of its end too; half a minute later at most."""
    if os.fork():
        return
    with suppress(OSError):  # by what is closed the process group learns that this one is gone
        for file in map(int, os.listdir("/proc/self/fd")):
            if file > 2:
                with suppress(OSError):  # the listing itself
                    os.close(file)
    with suppress(OSError, AttributeError):  # not Linux, or torchrun has ended already
        wait = select.poll()
        wait.register(os.pidfd_open(launcher), select.POLLIN)
        wait.poll(30_000)
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
    os._exit(0)


def _device() -> str:
    """cuda or cpu, whichever a run would take by default; torch is imported for it."""
    try:
        from ..runtime.distributed import pick_device

        return pick_device(None).type
    except ImportError:
        return "cpu"


def parser(command: str | None = None, device: str = "cpu") -> Parser:
    """The parser of the program, with the flags of one command; those of the others are not needed
    to run it. device: cuda or cpu, whose defaults the help shows."""
    whole = Parser(
        prog="dinofast",
        description="DINO pretraining (arXiv 2104.14294), exactly as published and fast.",
        usage="dinofast COMMAND [flags]",
        epilog="\n".join(
            [
                "commands:",
                *(f"    {name:13}{summary}" for name, summary in COMMANDS.items()),
                "\nstart with: dinofast demo, or dinofast pretrain DIR; dinofast COMMAND --help",
            ]
        ),
    )
    whole.add_argument("--version", action="version", version=f"dinofast {__version__}")
    commands = whole.add_subparsers(
        metavar="COMMAND", dest="command", required=True, help=argparse.SUPPRESS
    )
    for name in COMMANDS:
        module = module_of(name) if name == command else None
        one = commands.add_parser(
            name,
            prog=f"dinofast {name}",
            description=module.__doc__ if module else None,
            usage=_usage(name, module.Options) if module else None,
        )
        if module:
            group: argparse._ActionsContainer = one
            for field in fields(module.Options):
                if module.Options is Config and "topic" in field.metadata:
                    group = one.add_argument_group(field.metadata["topic"])
                add_argument(group, field, module.Options, device)
    return whole


def _usage(name: str, options: type) -> str:
    places = [field.metadata["metavar"] for field in fields(options) if _has_place(field, options)]
    needed = [
        f"--{field.name} {field.metadata['metavar']}"
        for field in fields(options)
        if field.default is MISSING and not _has_place(field, options)
    ]
    return " ".join(("dinofast", name, *places, *needed, "[flags]"))


def _has_place(field: Field, options: type) -> bool:
    """Whether an option may be given without its flag."""
    return bool(field.metadata.get("positional")) and not _is_inherited(field, options)


def _is_inherited(field: Field, options: type) -> bool:
    """Whether it is one of `pretrain`, in a command that takes those too."""
    return options is not Config and Config.__dataclass_fields__.get(field.name) is field


_KINDS = {int: (whole_number, "N"), float: (number, "X"), str: (str, "NAME")}


def add_argument(
    parser: argparse._ActionsContainer, field: Field, options: type, device: str = "cpu"
) -> None:
    """The flag of an option, or its place if it is positional. What is not given is absent from the
    result. A command that takes the flags of `pretrain` too does not list them."""
    about, default, extra = field.metadata, field.default, {}
    example = default[0] if isinstance(default, tuple) and default else default
    if about.get("choices"):
        extra["choices"], extra["type"] = about["choices"], partial(one_of, about["choices"])
        if "aliases" in about:
            extra["type"] = partial(meant, about["aliases"])
    elif isinstance(example, bool) or about.get("type") is bool:
        extra["type"], extra["metavar"] = truth, "BOOL"
    else:
        kind = about.get("type", type(example) if isinstance(example, int | float) else str)
        extra["type"], metavar = _KINDS[kind]
        extra["metavar"] = about.get("metavar", "DIR" if field.name.endswith("_dir") else metavar)
    if isinstance(default, tuple) or "nargs" in about:
        extra["nargs"] = about.get("nargs", len(default) if isinstance(default, tuple) else None)
        extra["const"] = True if extra["nargs"] == "?" else None  # the flag alone
    shown = with_flags(f"{about['help']}{_default(field, device)}".strip(), options)
    extra["help"] = shown.replace("%", "%%")
    if _is_inherited(field, options) or about.get("hidden"):
        extra["help"] = argparse.SUPPRESS
    if _has_place(field, options):  # its flag is taken as well; see `options_of`
        extra.pop("choices", None)  # its type checks them; argparse would check what is absent
        parser.add_argument(field.name, default=argparse.SUPPRESS, **{"nargs": "?", **extra})
        extra["help"] = argparse.SUPPRESS
        parser.add_argument(
            f"--{field.name}", dest=f"--{field.name}", default=argparse.SUPPRESS, **extra
        )
        return
    parser.add_argument(
        *about.get("flags", ()),
        f"--{field.name}",
        dest=field.name,
        default=argparse.SUPPRESS,
        **extra,
    )


def _default(field: Field, device: str) -> str:
    """What stands in for an option that is not given, in words, on this device; nothing that its
    advice says already."""
    about, default = field.metadata, field.default
    here, told = about.get("auto", {}).get(device), about["help"].rpartition("Default: ")
    if told[1]:
        return f" Here: {here}." if here and here not in told[2] else ""
    if default is MISSING or (about.get("positional") and "shown" not in about):
        return ""
    if here:
        where = "a GPU" if device == "cuda" else "a CPU"
        return f" (default: {here}, as on {where} here)"
    shown = in_words(default).lower() if isinstance(default, bool) else in_words(default)
    return f" (default: {about.get('shown', 'auto' if default is None else shown)})"


def options_of(make: type, given: dict[str, Any], usage: str = "") -> Any:
    """A command's options, from what was given on the command line; checked where they can be.
    usage: of the command, for what is missing."""
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    for field in fields(make):
        if (flag := f"--{field.name}") in given:
            if given.get(field.name, given[flag]) != given[flag]:
                raise ValueError(
                    f"{given[field.name]} and {flag} {given[flag]} are two: give one of them."
                )
            given[field.name] = given.pop(flag)
        about = field.metadata
        name = about["metavar"] if about.get("positional") else f"`{field.name}`"
        if given.get(field.name) == ():
            del given[field.name]  # a place where several may stand, and none does
        if given.get(field.name) == "":
            raise ValueError(f"{name} is an empty word, as a variable that is not set gives one.")
        if field.default is MISSING and field.name not in given:
            raise ValueError(f"{name} is missing: {_as_clause(about['help'])}. Usage: {usage}")
    if "use_fp16" in given and "precision" not in given:
        given["precision"] = "fp16" if given["use_fp16"] else "fp32"
    options = make(**given)
    return options.check() if hasattr(options, "check") else options


def _as_clause(sentence: str) -> str:
    """A sentence to stand behind a colon."""
    return sentence[0].lower() + sentence[1:].rstrip(".")


def with_flags(text: str, options: type) -> str:
    """A text with the options in it as they are written here: `lr` becomes --lr. Those of
    `pretrain`, and of this command."""
    names = {f.name for f in (*fields(Config), *fields(options))}
    return re.sub(
        r"`(\w+)`", lambda found: f"--{found[1]}" if found[1] in names else found[0], text
    )

"""A command line as people type it: what is meant is taken, what cannot be is said in a sentence
with the way out."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

from ..runtime.suggestions import did_you_mean
from ..runtime.terminal import printable, say
from .foreign_flags import instead_of

# what text editors make of two hyphens, and the minus sign
LONG_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
_TRUE, _FALSE = ("true", "on", "1", "yes"), ("false", "off", "0", "no")
_OTHER_WORDS = {
    "fp32": "float32 float 32 single full",
    "bf16": "bfloat16 bf16-mixed bfloat",
    "fp16": "float16 half 16 16-mixed",
    "cuda": "gpu",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the nearest right word, instead of printing the
    whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        # with an exponent too, or -1e-3 would be a flag
        self._negative_number_matcher = re.compile(f"^-{_NUMBER}$", re.I)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").removesuffix(".")
        flag, _, said = message.partition(": ")
        if said == "expected one argument":
            action = self._option_string_actions.get(flag)
            values = "true or false" if action and action.metavar == "BOOL" else "a value"
            message = f"{flag} stands alone: write {values} behind it"
        end = "" if message.endswith("?") else "."
        raise ValueError(f"{message}{end} See {self.prog} --help.")

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message, end="")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        if self._subparsers:  # the command's own parser looks at the words
            return super().parse_known_args(args, namespace)
        flags = [name for action in self._actions for name in action.option_strings]
        args = _numbers_apart([_underscored(word, flags) for word in args], self._actions)
        _check_lone_dashes(args, flags)
        namespace, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("-"):
                self._no_flag(word, args, flags)
        if unknown:
            self._too_many(unknown, namespace, flags)
        return namespace, unknown

    def _no_flag(self, word: str, args: list[str], flags: list[str]) -> NoReturn:
        flag, equals, value = word.partition("=")
        if not equals:
            value = next(iter(args[args.index(word) + 1 :]), "")
        command = self.prog.rpartition(" ")[2]
        way_out = instead_of(flag, value, command, flags) or did_you_mean(flag, flags)
        raise ValueError(f"there is no flag {flag}.{way_out} See {self.prog} --help.")

    def _too_many(
        self, words: list[str], namespace: argparse.Namespace, flags: list[str]
    ) -> NoReturn:
        first, more = words[0], len(words) - 1
        name, equals, value = first.partition("=")
        if f"--{name}" in flags:
            wanted = f"--{name} {value}" if equals else f"--{name}"
            raise ValueError(f"'{first}' is a flag without its dashes: write {wanted}.")
        place = next((a for a in self._actions if not a.option_strings), None)
        if place is None:
            raise ValueError(f"'{first}' is too much: {self.prog} takes flags alone, if any.")
        of_a_checkpoint = "--pretrained_weights" in flags
        if of_a_checkpoint and (
            os.path.isfile(first) or os.path.isfile(os.path.join(first, "checkpoint.pth"))
        ):
            raise ValueError(
                f"'{first}' is one argument too many: write --pretrained_weights {first}."
            )
        if equals and name.isidentifier() and not os.path.exists(first):
            raise ValueError(f"'{first}': options are written with dashes, --name value.")
        rest = f" and {more:,} more" if more else ""
        or_list = "" if of_a_checkpoint else ", or a text file with one path a line"
        raise ValueError(
            f"'{first}'{rest} cannot be taken as well: {place.metavar} is "
            f"'{getattr(namespace, place.dest)}' already; give one folder{or_list}."
        )


def check_dashes(words: Iterable[str]) -> None:
    """Raise ValueError for a flag that begins with a dash of a text editor."""
    for word in words:
        name = word.lstrip("-" + LONG_DASHES)
        dashes = word[: len(word) - len(name)]
        if name[:1].isalpha() and set(dashes) & set(LONG_DASHES) and not os.path.lexists(word):
            raise ValueError(
                f"'{word}' begins with a long dash, as text editors write it: type --{name}."
            )


def _check_lone_dashes(args: list[str], flags: list[str]) -> None:
    """Two dashes alone end the flags: what follows is a path, unless it was meant as a flag."""
    word = next(iter(args[args.index("--") + 1 :]), "") if "--" in args else ""
    if word and "{" not in word and not os.path.lexists(word):
        raise ValueError(
            f"'-- {word}' has a space after the dashes, and there is no file '{word}': write a "
            f"flag as one word.{did_you_mean(word, flags)}"
        )


def _underscored(word: str, flags: list[str]) -> str:
    """--batch-size 8 is --batch_size 8, where there is such a flag."""
    flag, equals, value = word.partition("=")
    other = "--" + flag[2:].replace("-", "_")
    known = flag.startswith("--") and flag not in flags and other in flags
    return other + equals + value if known else word


def _numbers_apart(args: list[str], actions: Sequence[argparse.Action]) -> list[str]:
    """`--scale 0.4,1` and `--scale=0.4 1` are `--scale 0.4 1`, for flags of several numbers."""
    several = {
        flag: action.nargs
        for action in actions
        for flag in action.option_strings
        if isinstance(action.nargs, int) and action.nargs > 1 or action.nargs == "+"
    }
    out: list[str] = []
    left: float = 0
    for word in args:
        flag, equals, value = word.partition("=")
        if flag in several:
            nargs = several[flag]
            left = nargs if isinstance(nargs, int) else float("inf")
            out.append(flag)
            if not equals:
                continue
            word = value
        elif word.startswith("--"):
            left = 0
        parts = re.findall(r"[^\s,()\[\]]+", word) if left > 0 else []
        if not parts or not all(re.fullmatch(_NUMBER, part, re.I) for part in parts):
            parts = [word]
        out += parts
        left -= len(parts)
    return out


def one_of(choices: Sequence[str], text: str) -> str:
    """One of the choices, in whatever case."""
    lower = text.lower()
    if text == argparse.SUPPRESS:  # a place where nothing stands
        return text
    if lower in choices:
        return lower
    if "cuda" in choices and re.fullmatch(r"((cuda|gpu):?)?\d+", lower):
        number = re.sub(r"\D", "", lower)
        raise argparse.ArgumentTypeError(
            f"'{text}' is one GPU of several: CUDA_VISIBLE_DEVICES={number} before the command "
            "chooses it"
        )
    meant = [word for word, others in _OTHER_WORDS.items() if lower in others.split()]
    near = [word for word in meant if word in choices]
    hint = f" Did you mean {near[0]}?" if near else did_you_mean(lower, choices)
    raise argparse.ArgumentTypeError(
        f"invalid choice: '{text}' (choose from {', '.join(choices)}){'.' * bool(hint)}{hint}"
    )


def truth(text: str) -> bool:
    """`true/false/on/off/1/0`, as the official flags take them, and yes/no."""
    if text.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"'{text}' is not a boolean: write true or false")
    return text.lower() in _TRUE


def _number(kind: type, what: str, text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        pass
    hint = ""
    if re.fullmatch(r"[-+]?\d+,\d+", text):
        hint = f": write {text.replace(',', '.' if kind is float else '')}"
    elif kind is int and re.fullmatch(_NUMBER, text, re.I) and float(text).is_integer():
        hint = f": write {int(float(text))}"
    elif os.path.isdir(text):
        hint = ": a folder stands before the flags"
    raise argparse.ArgumentTypeError(f"'{printable(text)}' is not {what}{hint}")


whole_number = partial(_number, int, "a whole number")
number = partial(_number, float, "a number")

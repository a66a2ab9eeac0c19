"""Completion for a shell, to be put where that shell looks for it:

bash  dinofast completion bash > ~/.local/share/bash-completion/completions/dinofast
zsh   dinofast completion zsh > ~/.dinofast.zsh; then a line `source ~/.dinofast.zsh` in ~/.zshrc
fish  dinofast completion fish > ~/.config/fish/completions/dinofast.fish
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields

from ..config import option
from ..runtime.terminal import say
from . import COMMANDS, module_of


@dataclass(frozen=True, kw_only=True)
class Options:
    shell: str = option(
        MISSING,
        "Of which shell.",
        choices=("bash", "zsh", "fish"),
        metavar="SHELL",
        positional=True,
    )


def run(options: Options) -> None:
    say({"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]())


def _flags(command: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Each flag of a command, the words that may follow it (none: a file or a number), and the
    first sentence of its help."""
    for field in fields(module_of(command).Options):
        about = field.metadata
        if about.get("hidden"):
            continue
        words = tuple(about.get("choices") or ())
        if isinstance(field.default, bool):
            words = ("true", "false")
        advice = about["help"].replace("`", "").partition(". ")[0].rstrip(".")
        yield f"--{field.name}", words, advice
    yield "--help", (), "Show the help"


def _bash() -> str:
    lines = [
        "_dinofast() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        "  if [ $COMP_CWORD -eq 1 ]; then",
        f'    COMPREPLY=($(compgen -W "{" ".join(COMMANDS)}" -- "$word")); return',
        "  fi",
        '  case "${COMP_WORDS[1]} $before" in',
    ]
    for command in COMMANDS:
        for flag, words, _ in _flags(command):
            if words:
                known = f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word")); return;;'
                lines.append(f'    "{command} {flag}") {known}')
    lines += ["  esac", '  case "$word" in -*) case "${COMP_WORDS[1]}" in']
    for command in COMMANDS:
        flags = " ".join(flag for flag, _, _ in _flags(command))
        lines.append(f'    {command}) COMPREPLY=($(compgen -W "{flags}" -- "$word"));;')
    lines += ["  esac;; esac", "}", "complete -o default -F _dinofast dinofast"]
    return "\n".join(lines)


def _zsh() -> str:
    there = "(( $+functions[compdef] )) || { autoload -U compinit && compinit -u }"
    return f"{there}\nautoload -U +X bashcompinit && bashcompinit\n{_bash()}"


def _fish() -> str:
    lines = [
        f"complete -c dinofast -n __fish_use_subcommand -f -a {command} -d {_quoted(summary)}"
        for command, summary in COMMANDS.items()
    ]
    for command in COMMANDS:
        for flag, words, advice in _flags(command):
            choices = f" -x -a {_quoted(' '.join(words))}" if words else " -r"
            lines.append(
                f"complete -c dinofast -n '__fish_seen_subcommand_from {command}' "
                f"-l {flag.removeprefix('--')}{choices} -d {_quoted(advice)}"
            )
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

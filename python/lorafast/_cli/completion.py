"""`lorafast completion`: what makes a shell complete commands, options and paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.command import Command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from lorafast._cli.terminal import Terminal

SHELLS = ("bash", "zsh", "fish")
#: What arguments are called whose values are paths, and those of them that are directories.
DIRECTORIES = {"DIR"}
FILES = {"ADAPTER", "BASE", "CANDIDATE", "FILE", "NEW", "OLD", "PATH", "TARGET", "TUNED"}
#: Paths and, behind any number of them, the next option: shtab's own functions know paths alone.
#: A name with `_file` in it makes bash add slashes and quotes.
BASH = """\
_lorafast_file() {
  if [[ "$completing_word" == -* ]]; then
    compgen -W "${current_option_strings[*]}" -- "$completing_word"
  else
    compgen -f -- "$1"
  fi
}"""
#: The same for zsh: an option that takes words up to the next option is asked for that, too.
ZSH = """\
_lorafast_option() {
  [[ $PREFIX == -* ]] || return 1
  local -a specifications=("${(@P)${:-_shtab_lorafast_${words[1]//-/_}_options}}")
  compadd -- ${(M)${${specifications%%\\[*}##*[) *]}:#-*}
}
_lorafast_file() {
  _lorafast_option || _files
}"""
#: The same for fish, where shtab's options have one value.
FISH = """
function _lorafast_in_paths
  set -l option ''
  for word in (commandline -opc)
    switch "$word"
      case '-*'
        set option $word
    end
  end
  contains -- "$option" {options}
end
complete -c lorafast -n _lorafast_in_paths -F
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorafast completion`."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads it")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print the completion of a shell."""
    terminal.document(script(arguments.shell))
    return 0


def script(shell: str) -> str:
    """The completion of a shell, which is generated from the parsers of all commands."""
    import shtab

    from lorafast._cli.commands import commands
    from lorafast._cli.parser import build_parser

    every = commands([])
    parser = build_parser(every)
    summaries = {command.name: command.summary for command in every}
    several: set[str] = set()
    for name, subparser in _subparsers(parser):
        # The list of commands has a line for each.
        subparser.description = summaries[name]
        for action in subparser._actions:
            if action.metavar in FILES:
                own = (
                    {"bash": "_lorafast_file", "zsh": "_lorafast_file"}
                    if action.nargs == "+"
                    else {}
                )
                several.update(action.option_strings if own else ())
                action.complete = shtab.FILE | own  # type: ignore[attr-defined]
            elif action.metavar in DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            if shell == "zsh" and action.option_strings and action.nargs == "+":
                if not hasattr(action, "complete"):
                    action.complete = {"zsh": "_lorafast_option"}  # type: ignore[attr-defined]
                # It takes words up to the next option: `:*PATTERN:MESSAGE:ACTION` of `_arguments`.
                action.metavar = f"*-*:{action.metavar}"
    text: str = shtab.complete(parser, shell, preamble={"bash": BASH, "zsh": ZSH}.get(shell, ""))
    return text + FISH.format(options=" ".join(sorted(several))) if shell == "fish" else text


def _subparsers(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    import argparse

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


COMMAND = Command(
    name="completion",
    summary="print what makes a shell complete commands, options and paths",
    description="Print a script for bash, zsh or fish that completes commands, options, their\n"
    "values and paths. It needs no Python while it completes, and is written again after an\n"
    "upgrade. zsh finds it in any directory of $fpath.",
    examples=(
        "lorafast completion bash > ~/.local/share/bash-completion/completions/lorafast",
        "lorafast completion zsh > ~/.zfunc/_lorafast",
        "lorafast completion fish > ~/.config/fish/completions/lorafast.fish",
    ),
    add_arguments=add_arguments,
    run=run,
)

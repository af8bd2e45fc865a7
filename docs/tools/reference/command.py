"""docs/reference/command.md: every command with its usage, options, exit codes and examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lorafast._cli.command import EXIT_CODES
from lorafast._cli.commands import RENAMED

from reference.parsers import Argument, Page
from reference.words import GENERATED, sentence, table

INTRODUCTION = f"""\
{GENERATED}

# The command

`lorafast COMMAND` does what the Python function of the same name does, with options of the same
names. Results go to stdout; progress, warnings and errors go to stderr. `--help` shows what this
page says, `lorafast --version` the version.
"""
EXITS = """
## Exit codes

Every command ends with one of these. What a command adds to them stands with it.

"""
#: What is set as code within a help text: flags, and words that are typed.
FLAG = re.compile(r"(?<![\w`-])(--?[a-z][\w-]*(?:=\w+)?)(?![\w`])")


def render(pages: Sequence[Page]) -> str:
    """The page."""
    lines = [INTRODUCTION]
    lines += table(
        ["Command", "What it does"],
        ([f"[`{page.name}`](#lorafast-{page.name})", page.command.summary] for page in pages),
    )
    old = ", ".join(f"`{older}` is called `{newer}` now" for older, newer in RENAMED.items())
    lines += ["", f"Older names still work: {old}.", EXITS.rstrip("\n"), ""]
    lines += table(["Code", "Meaning"], ([str(code), why] for code, why in EXIT_CODES))
    for page in pages:
        lines += ["", *_section(page)]
    return "\n".join(lines) + "\n"


def _section(page: Page) -> Iterator[str]:
    yield f"## lorafast {page.name}"
    yield ""
    for paragraph in page.paragraphs:
        yield escaped(paragraph)
        yield ""
    yield from ("```text", page.usage, "```")
    for group in page.groups:
        yield ""
        if len(page.groups) > 1:
            yield f"**{group.title[0].upper()}{group.title[1:]}**"
            yield ""
        rows = [_row(argument) for argument in group.arguments]
        columns = ["Argument", "Meaning", "Default"]
        if not any(row[2] for row in rows):
            rows, columns = [row[:2] for row in rows], columns[:2]
        yield from table(columns, rows)
    if page.command.exit_codes:
        codes = ", ".join(f"{code}: {escaped(why)}" for code, why in page.command.exit_codes)
        yield from ("", f"**Exit codes** besides those of every command: {codes}.")
    yield from ("", "**Examples**", "", "```bash")
    yield from page.command.examples
    yield "```"


def _row(argument: Argument) -> list[str]:
    names = [f"`{flag}`" for flag in argument.flags]
    if argument.value:
        value = argument.value.replace("|", "\\|")
        last = f"{argument.flags[-1]} {value}" if argument.flags else value
        names[-1:] = [f"`{last}`"]
    meaning = sentence(escaped(argument.help))
    if argument.choices:
        meaning += " One of " + ", ".join(f"`{choice}`" for choice in argument.choices) + "."
    if argument.required:
        meaning += " Required."
    return [", ".join(names), meaning, escaped(argument.default)]


def escaped(text: str) -> str:
    """Words of a help text in Markdown, flags as code."""
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        plain = re.sub(r"([*_|<>\[\]])", r"\\\1", parts[place])
        parts[place] = FLAG.sub(r"`\1`", plain)
    return "`".join(parts)

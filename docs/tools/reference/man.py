"""The manual pages: lorafast(1), and one of each command."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lorafast._cli.command import EXIT_CODES

from reference.parsers import Argument, Page
from reference.words import sentence

GENERATED = '.\\" Generated: `make reference` writes this file from the code.'
DESCRIPTION = "Merge LoRA adapters into safetensors checkpoints, as fast as copying them."
#: Flags of the command itself.
OWN = (
    Argument(("-V", "--version"), "", "show the version", "", (), required=False),
    Argument(("-h", "--help"), "", "show help; behind a command, its own", "", (), required=False),
)
#: Columns of the source's lines.
WIDTH = 100


def render(pages: Sequence[Page]) -> dict[str, str]:
    """The pages by the names of their files."""
    manual = {"lorafast.1": _join(_overview(pages))}
    for page in pages:
        manual[f"lorafast-{page.name}.1"] = _join(_command(page))
    return manual


def _join(lines: Iterator[str]) -> str:
    return "\n".join(lines) + "\n"


def _head(name: str, summary: str) -> Iterator[str]:
    yield GENERATED
    # Neither a date nor a version: the page is the one of the command beside it.
    yield f'.TH "{escaped(name.upper())}" "1" "" "lorafast" "User Commands"'
    yield ".SH NAME"
    yield f"{escaped(name)} \\- {escaped(summary)}"


def _overview(pages: Sequence[Page]) -> Iterator[str]:
    yield from _head("lorafast", "merge LoRA adapters, and measure what they hold")
    yield ".SH SYNOPSIS"
    yield "\\fBlorafast\\fR \\fICOMMAND\\fR [\\fIOPTIONS\\fR] \\fIARGUMENTS\\fR"
    yield ".SH DESCRIPTION"
    yield from _text(DESCRIPTION)
    yield from _text("Results go to stdout; progress, warnings and errors go to stderr.")
    yield ".SH COMMANDS"
    for page in pages:
        yield ".TP"
        yield f"\\fBlorafast\\-{escaped(page.name)}\\fR(1)"
        yield from _text(sentence(page.command.summary))
    yield ".SH OPTIONS"
    for argument in OWN:
        yield from _argument(argument)
    yield from _exit_status(EXIT_CODES)


def _command(page: Page) -> Iterator[str]:
    yield from _head(f"lorafast-{page.name}", page.command.summary)
    yield ".SH SYNOPSIS"
    first, second, *rest = page.usage.split(" ")
    yield " ".join([f"\\fB{first} {escaped(second)}\\fR", *map(_of_usage, rest)])
    yield ".SH DESCRIPTION"
    for number, paragraph in enumerate(page.paragraphs):
        if number:
            yield ".PP"
        yield from _text(paragraph)
    for group in page.groups:
        yield f'.SH "{escaped(group.title.upper())}"'
        for argument in group.arguments:
            yield from _argument(argument)
    yield from _exit_status(sorted({**dict(EXIT_CODES), **dict(page.command.exit_codes)}.items()))
    yield ".SH EXAMPLES"
    yield ".EX"
    yield from (_guarded(escaped(line)) for line in page.command.examples)
    yield ".EE"
    yield ".SH SEE ALSO"
    yield "\\fBlorafast\\fR(1)"


def _of_usage(word: str) -> str:
    face = "B" if word.startswith("-") else "I"
    return f"\\f{face}{escaped(word)}\\fR"


def _argument(argument: Argument) -> Iterator[str]:
    value = f"\\fI{escaped(argument.value)}\\fR" if argument.value else ""
    flags = ", ".join(f"\\fB{escaped(flag)}\\fR" for flag in argument.flags)
    yield ".TP"
    yield f"{flags} {value}".strip()
    yield from _text(sentence(argument.help))
    if argument.choices:
        yield from _text(f"One of {', '.join(argument.choices)}.")
    if argument.required:
        yield from _text("Required.")
    if argument.default:
        yield from _text(f"Default: {sentence(argument.default)}")


def _exit_status(codes: Sequence[tuple[int, str]]) -> Iterator[str]:
    yield '.SH "EXIT STATUS"'
    for code, why in codes:
        yield ".TP"
        yield f"\\fB{code}\\fR"
        yield from _text(sentence(why))


def _text(text: str) -> Iterator[str]:
    """A paragraph, with words in backticks in bold."""
    marked = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escaped(text))
    line = ""
    for word in marked.split():
        if line and len(line) + 1 + len(word) > WIDTH:
            yield _guarded(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    if line:
        yield _guarded(line)


def _guarded(line: str) -> str:
    """A line that begins like a request, as text."""
    return f"\\&{line}" if line[:1] in (".", "'") else line


def escaped(text: str) -> str:
    """Text for roff, with hyphens that can be copied as they are typed."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")

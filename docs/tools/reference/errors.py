"""docs/reference/errors.md: every exception, with what raises it, its cause and its remedy."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import lorafast.errors

from reference.words import GENERATED

INTRODUCTION = f"""\
{GENERATED}

# Errors

All exceptions of lorafast are kinds of `lorafast.LorafastError`; those that are a kind of one of
Python's own can be caught as that, too. The command prints them as one line `error: …`, ends with
exit code 1, and with `--json` prints `kind`, `message` and `problems` as well. Besides these, a
path that is not there is a `FileNotFoundError`, another refusal of the operating system the
`OSError` that it is, and an argument outside its domain a `ValueError`.
"""


class Entry(NamedTuple):
    """What there is to say of an exception besides its docstring."""

    raised_by: str
    cause: str
    remedy: str


ENTRIES = {
    "LorafastError": Entry("nothing itself", "It is the base of all others.", "Catch it for all."),
    "CheckpointError": Entry(
        "whatever reads a base: `merge`, `plan`, `verify`, `inspect`, `extract`",
        "A download that was cut off, an index that names other files, a Git LFS pointer in the "
        "place of a file, or a directory that is something else; the message says which.",
        "Fetch the file again, or name the directory with the config and the weights.",
    ),
    "AdapterError": Entry(
        "whatever reads an adapter",
        "Files are missing or broken, factors lack their other half, or shapes and config differ.",
        "`lorafast inspect ADAPTER` shows what is there; save or fetch it again. Where the "
        "files do "
        "not tell the format, `--format` does.",
    ),
    "UnsupportedAdapterError": Entry(
        "whatever reads an adapter",
        "A feature that no merge into weights can have (a part that depends on the input), or one "
        "that is not read.",
        "The [conformance table](../conformance.md) and the [formats](../formats.md) list what is. "
        "A field of a config that is not known and changes nothing can be allowed (`--allow`).",
    ),
    "PlanError": Entry(
        "`merge`, `plan`, `verify` and `subtract`, before anything is written",
        "Modules that the base lacks, other shapes, or two adapters that exclude each other: in "
        "most "
        "cases another base than the one that was trained. `problems` has a sentence for each.",
        "`--dry-run` shows the plan; give the base that the adapter's config names.",
    ),
    "OutputError": Entry(
        "whatever writes: `merge`, `subtract`, `convert`, `combine`, reports",
        "The output exists, lies within an input, is locked by another merge, or holds a merge "
        "that "
        "did not end.",
        "Choose another directory, or `--overwrite`; `lorafast recover DIR` finishes or takes back "
        "what was killed.",
    ),
    "StoreError": Entry(
        "reading from and writing to `s3://`, `gs://`, `az://` and `http(s)://`",
        "Credentials or permissions are missing, the object is not there, or the store cannot be "
        "reached.",
        "The message names object and permission; [stores](../stores.md) has the settings.",
    ),
    "NumericError": Entry(
        "`merge` and what else rounds",
        "A result outside the range of its type, mostly of float16.",
        "Write bfloat16 or float32 (`--dtype`), or use a smaller weight; look at the adapter with "
        "`lorafast analyze`.",
    ),
    "DeviceError": Entry(
        "everything with a `device`",
        "torch sees no such device, its memory is too small, or it cannot compute the type.",
        "Use `cpu` or `auto`, or less memory (`--device-memory`).",
    ),
    "VerificationError": Entry(
        "`merge(verify=True)` and `subtract`",
        "A disk, memory or file system that gives back something else than was written, or a file "
        "that was changed meanwhile. There is no new model then.",
        "Merge again; if it happens again, check the disk and the memory.",
    ),
    "TensorNotFoundError": Entry(
        "merged views (`lorafast.open_merged`)",
        "A name that the merged model does not have.",
        "`keys()` lists the names.",
    ),
    "WorkerError": Entry(
        "everything with an `executor`",
        "A process was killed, mostly for its memory, or a node of the cluster went away.",
        "Run it again: what was finished is kept. Use fewer workers or threads.",
    ),
    "MissingDependencyError": Entry(
        "whatever needs an optional package, before it reads anything",
        "The extra is not installed.",
        "The message ends with the command that installs all that is missing.",
    ),
}


def render() -> str:
    """The page."""
    lines = [INTRODUCTION.rstrip("\n")]
    for name in lorafast.errors.__all__:
        kind, entry = getattr(lorafast.errors, name), ENTRIES[name]
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        lines += [
            "",
            f"## {name}",
            "",
            inspect.cleandoc(kind.__doc__).partition("\n\n")[0],
            "",
            f"- **A kind of**: {bases}",
            f"- **Raised by**: {entry.raised_by}",
            f"- **Cause**: {entry.cause}",
            f"- **Remedy**: {entry.remedy}",
        ]
    return "\n".join(lines) + "\n"

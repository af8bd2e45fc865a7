"""Ids on the Hugging Face hub: how they are spelled, and files that are fetched by them.

An id is `owner/name[@revision][/sub/folder]`, or the same after `hf://`. A revision goes on to the
next slash, so one with a slash in it has `%2F` there; only `refs/pr/N` and `refs/convert/NAME` are
understood as they are. What follows is a folder of the repository, or a file of weights in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lorafast._errors import LorafastError, missing
from lorafast._io.paths import expand, find, is_directory, is_file, output_path

#: What a text begins with that can only be an id.
SCHEME = "hf://"
#: `name` or `owner/name`, as the hub allows it, with what may follow.
ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?:@(?P<revision>refs/(?:pr/\d+|convert/\w+)|[^/@]+))?"
    r"(?P<below>(?:/[^/]+)*)/?",
    re.ASCII,
)
#: What the hub allows in no name.
NO_NAME = re.compile(r"--|\.\.|[-.](?:/|$)|\.git(?:/|$)")
#: The hub's other kinds of repositories, as its own URLs have them before the owner.
OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
#: Endings of files of weights, which an id may end in.
WEIGHTS_ENDINGS = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".npz"})
#: A repository in the hub's cache: `models--owner--name/snapshots/<commit>`, and what lies below.
CACHED = re.compile(r"(?:^|[\\/])models--([^\\/]+)[\\/]snapshots[\\/]([^\\/]+)(?:[\\/](.+))?$")
#: A commit, which no branch moves.
COMMIT = re.compile(r"[0-9a-f]{40}")
#: What the hub's client is needed for.
FETCH = "fetch {!r}, which is no path here, from the hub"
#: The packages that huggingface_hub speaks HTTP with, of one release or another.
HTTP_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})
#: What to do where the hub asks who one is.
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubId(NamedTuple):
    """A repository of a model on the hub, or something in it.

    Attributes:
        repository: `owner/name`, or the name of one without owner.
        revision: a branch, a tag or a commit; the repository's main branch if `None`.
        below: the folder, or the file of weights; empty for the whole repository.
    """

    repository: str
    revision: str | None = None
    below: str = ""

    def __str__(self) -> str:
        revision = self.revision or ""
        if not revision.startswith("refs/"):
            revision = revision.replace("/", "%2F")
        return (
            self.repository
            + (f"@{revision}" if revision else "")
            + (f"/{self.below}" if self.below else "")
        )

    @property
    def file(self) -> str | None:
        """The name of the file of weights, where it is one that is named."""
        name = self.below.rpartition("/")[2]
        return name if Path(name).suffix.lower() in WEIGHTS_ENDINGS else None

    @property
    def folder(self) -> str:
        """The folder, or the one of the file; empty for the repository's own."""
        return self.below if self.file is None else self.below.rpartition("/")[0]


def is_hub_url(source: object) -> bool:
    """Whether a source says that it lies on the hub, as no path does."""
    return isinstance(source, str) and source.startswith(SCHEME)


def parse(source: object) -> HubId | None:
    """What a text names on the hub; `None` for what can be no id, as a path with a dot before it.

    Raises:
        ValueError: it begins as an id, and is none of a model.
    """
    if not isinstance(source, str):
        return None
    text = source.removeprefix(SCHEME)
    if is_url := is_hub_url(source):
        kind, _, rest = text.partition("/")
        if kind in OTHER_KINDS:
            raise ValueError(f"{source}: is of the hub's {kind}; models are read alone")
        text = rest if kind == "models" and "/" in rest else text
    found = ID.fullmatch(text)
    named = None if found is None else _named(found)
    if named is None and is_url:
        raise ValueError(
            f"{source}: is no id of the hub; one is hf://owner/name[@revision][/sub/folder]"
        )
    return named


def _named(found: re.Match[str]) -> HubId | None:
    repository, revision = found["repository"], found["revision"]
    below = found["below"].strip("/")
    is_path = any(part in (".", "..") for part in below.split("/")) or "\\" in below
    # Without an owner nothing can follow: it would be the name.
    if NO_NAME.search(repository) or is_path or (below and "/" not in repository):
        return None
    if revision is not None:
        revision = revision.replace("%2F", "/").replace("%2f", "/")
    return HubId(repository, revision, below)


def is_certainly_of_the_hub(source: str | os.PathLike[str]) -> bool:
    """Whether what is no path here is an id with an owner, rather than a mistyped path."""
    if is_hub_url(source):
        return True
    named = parse(source)
    if named is None or "/" not in named.repository:
        return False
    return not os.path.lexists(named.repository.partition("/")[0])


def with_revision(base: str | os.PathLike[str], revision: str | None) -> str | os.PathLike[str]:
    """The id of a base at a revision that is given beside it.

    Raises:
        ValueError: the base is a path here, or its id has another revision.
    """
    if revision is None:
        return base
    if not isinstance(revision, str) or not revision:
        raise ValueError(f"revision must be a branch, a tag or a commit, not {revision!r}")
    if not is_hub_url(base) and find(expand(base)) is not None:
        raise ValueError(
            f"revision={revision!r} is of a base on the hub, and {os.fspath(base)} is a path here; "
            "leave it out"
        )
    named = parse(base)
    if named is None:
        return base
    if named.revision not in (None, revision):
        raise ValueError(
            f"{base}: its revision is {named.revision}, and revision={revision!r} is another; "
            "give one of them"
        )
    return f"{SCHEME}{named._replace(revision=revision)}"


def require_directory(output: str | os.PathLike[str]) -> str:
    """The path of an output that is written here alone.

    Raises:
        ValueError: it lies on the hub.
    """
    if is_hub_url(output):
        raise ValueError(
            f"{output}: only merge writes to the hub, and safetensors files alone; write into a "
            "directory here, and send that with `hf upload`"
        )
    return output_path(output)


class Repository:
    """A repository, from which files are fetched into the hub's cache.

    All of them are of one commit, whatever becomes of a branch meanwhile.

    Attributes:
        named: the id.
    """

    def __init__(self, named: HubId, text: str, *, local_files_only: bool) -> None:
        """Takes the id.

        Args:
            named: the id.
            text: how it was given.
            local_files_only: look into the cache, and never ask the hub.

        Raises:
            MissingDependencyError: the hub's client is not installed.
        """
        try:
            import huggingface_hub
            from huggingface_hub import errors
        except ImportError as error:
            raise missing("huggingface_hub", "hub", FETCH.format(text)) from error
        self.named = named
        self._text = text
        self._client = huggingface_hub
        self._offline: type[Exception] = errors.OfflineModeIsEnabled
        self._local = local_files_only
        self._revision = named.revision

    def fetch(self, names: Sequence[str]) -> str:
        """Fetches the files of the folder that patterns name; returns where the folder lies."""
        from glob import escape

        folder = self.named.folder
        patterns = [f"{escape(folder)}/{name}" for name in names] if folder else list(names)
        settings: dict[str, Any] = {} if self._revision is None else {"revision": self._revision}
        root = Path(
            self._client.snapshot_download(
                self.named.repository,
                allow_patterns=patterns,
                local_files_only=self._local,
                **settings,
            )
        )
        if COMMIT.fullmatch(root.name):
            self._revision = root.name
        return str(root / folder) if folder else str(root)

    def names(self) -> list[str] | None:
        """All files of the folder, by their paths in it; `None` where the hub may not be asked."""
        if self._local:
            return None
        settings: dict[str, Any] = {} if self._revision is None else {"revision": self._revision}
        try:
            every = self._client.list_repo_files(self.named.repository, **settings)
        except self._offline:
            return None
        before = f"{self.named.folder}/" if self.named.folder else ""
        return [name.removeprefix(before) for name in every if name.startswith(before)]

    def require(self, place: Path) -> Path:
        """A folder or a file that was fetched, once it is found to be there.

        Raises:
            FileNotFoundError: the repository has no such thing, or the cache.
            LorafastError: there is nothing in it that was asked for.
        """
        if is_directory(place) or is_file(place):
            return place
        named, text = self.named, self._text
        names = self.names()
        if names is None:
            raise FileNotFoundError(
                2, "No such file or directory, and not all of it is in the hub's cache", text
            )
        what = named.below.rpartition("/")[2] if named.file is not None else named.folder
        is_there = named.file in names if named.file is not None else bool(names)
        if what and not is_there:
            kind = "file" if named.file is not None else "folder"
            at = "" if named.revision is None else f" at {named.revision}"
            raise FileNotFoundError(
                2, f"No {kind} {what!r} in the repository {named.repository}{at} on the hub", text
            )
        listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        raise LorafastError(
            f"{text}: holds nothing on the hub that could be read"
            + (f" (it has {listed})" if names else "; it is empty")
        )


@contextmanager
def told_of(named: HubId, text: str) -> Iterator[None]:
    """What the hub's client raises, as errors that say what is wrong and what to do.

    Args:
        named: the id.
        text: how it was given.

    Raises:
        FileNotFoundError: there is no such repository or revision, or the hub cannot be reached.
        LorafastError: the hub refuses.
    """
    from huggingface_hub import constants, errors

    where = f"{constants.ENDPOINT}/{named.repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise LorafastError(
            f"{text}: is gated: ask for access at {where}, then {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            2, f"No revision {named.revision!r} of {named.repository} on the hub", text
        ) from error
    except errors.RepositoryNotFoundError as error:
        if _status(error) == 401:
            raise FileNotFoundError(
                2,
                "No such file or directory, and no public repository of that name on the hub "
                f"(for a private one, {LOG_IN})",
                text,
            ) from error
        raise FileNotFoundError(
            2, "No such file or directory, and no repository of that name on the hub", text
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        # Nothing was fetched and nothing can be: the path is what the user can mend.
        raise FileNotFoundError(
            2,
            "No such file or directory, and the hub cannot be reached for it, nor is all of it in "
            "its cache",
            text,
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        if isinstance(error, FileNotFoundError) and error.filename == text:
            raise
        if _status(error) == 401:
            raise LorafastError(
                f"{text}: the hub does not accept the token (401); {LOG_IN}"
            ) from error
        if _status(error) == 403:
            raise LorafastError(
                f"{text}: the hub refuses (403): the token may not do this; {LOG_IN}"
            ) from error
        raise LorafastError(f"{text}: the hub could not do this: {_reason(error)}") from error
    except Exception as error:
        # The client passes on what its own client for HTTP raises, whichever that is.
        if type(error).__module__.partition(".")[0] not in HTTP_CLIENTS:
            raise
        raise LorafastError(f"{text}: the hub cannot be reached: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _status(error: BaseException) -> int | None:
    """The status that the hub has answered with."""
    return getattr(getattr(error, "response", None), "status_code", None)

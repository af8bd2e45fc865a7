"""Merges that end on the hub: written into a temporary directory, then sent as one commit.

Whoever loads the repository finds the older model or the new one: there is no commit of a part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafast._errors import LorafastError, OutputError, missing
from lorafast._io import hub, scratch
from lorafast._io.sources import CONFIG

if TYPE_CHECKING:
    from lorafast._merge.options import ExecutionOptions
    from lorafast._merge.report import MergeReport

#: What lists a model's files, and what its shards.
MANIFEST, INDEX = "lorafast_manifest.json", "model.safetensors.index.json"
#: What the hub itself puts into a new repository.
MADE_WITH_IT = frozenset({".gitattributes"})
#: What the hub answers where another commit came first.
CONFLICTS = (409, 412)


class Target(NamedTuple):
    """Where an output goes.

    Attributes:
        named: the repository, the branch and the folder.
        text: the output as it was given.
        head: the commit that the new one follows; `None` where there is no such repository.
        has_branch: whether the branch is there.
        files: the names of the folder's files, by their paths in it.
        is_public: whether everybody sees the repository that is there.
    """

    named: hub.HubId
    text: str
    head: str | None
    has_branch: bool
    files: list[str]
    is_public: bool = False

    @property
    def folder(self) -> str:
        """What stands before the names of files in the repository."""
        return f"{self.named.below}/" if self.named.below else ""


def publish(
    carried_out: Callable[[Path, ExecutionOptions], AbstractContextManager[MergeReport]],
    output: str,
    execution: ExecutionOptions,
) -> MergeReport:
    """Carries a plan out, and sends what was written to the hub.

    With `verify` what was written is proved before it is sent.

    Args:
        carried_out: carries it out into a directory.
        output: `hf://owner/name[@branch][/sub/folder]`.
        execution: how it is carried out.

    Raises:
        ValueError: the output names no repository with an owner; or a branch, and a pull request is
            asked for.
        MissingDependencyError: the hub's client is not installed.
        OutputError: a model is there already; or another commit came first.
        LorafastError: the hub refuses, or cannot be reached; or as for `MergePlan.execute`.
    """
    from lorafast._merge.report import write_afterwards

    named = _named(output, execution)
    api = _client(output)
    with hub.told_of(named, output):
        target = _look(api, named, output)
    _refuse(target, execution)
    with scratch.directory() as folder:
        # What is sent lies here for minutes; the hub has it for good.
        local = execution._replace(overwrite=False, sync=False, private=False, pull_request=False)
        staged = folder / "model"
        with carried_out(staged, local) as done:
            result = done._replace(output_path=output)
            if execution.report:
                write_afterwards(result, str(staged))
        with hub.told_of(named, output):
            commit = _send(api, target, staged, execution)
    where = commit.pr_url or commit.commit_url
    result.notes.append(f"published: {where}")
    return result


def _named(output: str, execution: ExecutionOptions) -> hub.HubId:
    named = hub.parse(output)
    if named is None or "/" not in named.repository or named.file is not None:
        raise ValueError(f"{output}: an output on the hub is hf://owner/name[@branch][/sub/folder]")
    if execution.pull_request and named.revision not in (None, "main"):
        raise ValueError(
            f"{output}: a pull request is made for the main branch; leave @{named.revision} out"
        )
    return named


def _client(output: str) -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise missing("huggingface_hub", "hub", f"write to {output}") from error
    if constants.HF_HUB_OFFLINE:
        raise LorafastError(
            f"{output}: nothing is sent to the hub while HF_HUB_OFFLINE is set; unset it, or give "
            "a directory"
        )
    if huggingface_hub.get_token() is None:
        raise LorafastError(f"{output}: the hub takes files of users alone; {hub.LOG_IN}")
    from lorafast import _core

    return huggingface_hub.HfApi(library_name="lorafast", library_version=_core.__version__)


def _look(api: Any, named: hub.HubId, output: str) -> Target:
    """What is at the place of an output."""
    from huggingface_hub import errors

    look: Callable[..., Any] = partial(api.model_info, named.repository)
    has_branch = True
    try:
        info = look(revision=named.revision)
    except errors.RevisionNotFoundError:
        # It will branch off from the main one.
        info, has_branch = look(), False
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return Target(named, output, None, named.revision in (None, "main"), [])
    before = f"{named.below}/" if named.below else ""
    names = [each.rfilename for each in info.siblings or ()]
    files = [name.removeprefix(before) for name in names if name.startswith(before)]
    return Target(named, output, info.sha, has_branch, files, not info.private)


def _refuse(target: Target, execution: ExecutionOptions) -> None:
    """Refuses what a merge may not replace.

    Raises:
        OutputError: something is there, and `overwrite` is not asked for; or an adapter; or the
            repository is public, and a private one is asked for.
    """
    if execution.private and target.is_public:
        raise OutputError(
            f"{target.text}: is a public repository already; make it private in its settings, or "
            "give another"
        )
    if CONFIG in target.files:
        raise OutputError(f"{target.text}: an adapter lies there; give another repository")
    there = [name for name in target.files if name not in MADE_WITH_IT]
    if there and not (execution.overwrite or execution.pull_request):
        listed = ", ".join(there[:4]) + (", …" if len(there) > 4 else "")
        raise OutputError(
            f"{target.text}: is not empty ({listed}); replace what is there with overwrite=True "
            "(--overwrite), or give another repository, branch or folder"
        )


def _send(api: Any, target: Target, staged: Path, execution: ExecutionOptions) -> Any:
    """Sends a directory as one commit on what was there before the merge."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

    named, head = target.named, target.head
    repository = named.repository
    if head is None:
        api.create_repo(repository, private=True if execution.private else None)
    if not target.has_branch:
        api.create_branch(repository, branch=named.revision, revision=head)
    if head is None:
        head = api.model_info(repository, revision=named.revision).sha
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    names = [path.relative_to(staged).as_posix() for path in files]
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=f"{target.folder}{name}", path_or_fileobj=str(path))
        for name, path in zip(names, files, strict=True)
    ]
    operations += [
        CommitOperationDelete(path_in_repo=f"{target.folder}{name}")
        for name in _older(api, target)
        if name not in names
    ]
    try:
        return api.create_commit(
            repository,
            operations,
            commit_message="Merge LoRA adapters with lorafast",
            revision=named.revision,
            parent_commit=head,
            create_pr=execution.pull_request,
        )
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in CONFLICTS:
            raise OutputError(
                f"{target.text}: somebody else's commit came first, and nothing was written; look "
                "at it, and run the merge again"
            ) from error
        raise
    except (RuntimeError, ValueError) as error:
        # A card whose front matter the hub refuses; a file that did not get there.
        reason = " ".join(str(error.__cause__ or error).split())
        raise LorafastError(f"{target.text}: could not be sent: {reason}") from error


def _older(api: Any, target: Target) -> list[str]:
    """The files of an older model there: what its manifest and its index list."""
    found: set[str] = {"model.safetensors", INDEX, MANIFEST}
    for name in (MANIFEST, INDEX):
        if name not in target.files:
            continue
        path = api.hf_hub_download(
            target.named.repository, f"{target.folder}{name}", revision=target.head
        )
        try:
            listed = json.loads(Path(path).read_bytes())
        except ValueError:
            continue
        found |= set(_listed(listed))
    # What lists files is a stranger's.
    return [
        name for name in target.files if name in found and ".." not in PurePosixPath(name).parts
    ]


def _listed(listed: Any) -> list[str]:
    """The names in a manifest or an index."""
    if not isinstance(listed, dict):
        return []
    shards, entries = listed.get("weight_map"), listed.get("files")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if isinstance(entries, list):
        names += [entry.get("name") for entry in entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]

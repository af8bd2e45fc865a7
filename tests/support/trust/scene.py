"""A base, two models that can be made of it, an output, and everything that must stay as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.files import read_safetensors, snapshot, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.pipelines import CLIP_L, SDXL, UNET, make_pipeline, prefixed
from support.trust.command import Argument, Outcome, lorafast

STAGING = ".lorafast-partial"
MANIFEST = "lorafast_manifest.json"
#: Files that tell of a merge and hold times: compared by what they say, not by their bytes.
REPORTS = (
    "merge_report.json",
    "merge_report.md",
    "subtract_report.json",
    "subtract_report.md",
    # The card calls the inputs by the names of their directories, which differ between scenes.
    "README.md",
)
#: Others' files in an output that is overwritten.
BYSTANDERS = {"notes.txt": b"mine", "style-lora.safetensors": b"another's adapter"}

# Module path -> (out, in).
SMALL = {
    f"model.layers.{n}.{name}": shape
    for n in range(3)
    for name, shape in (("self_attn.q_proj", (48, 40)), ("mlp.up_proj", (100, 40)))
}
LARGE = {
    f"model.layers.{n}.{name}": shape
    for n in range(4)
    for name, shape in (("self_attn.q_proj", (512, 512)), ("mlp.up_proj", (1024, 512)))
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_temporary(name: str) -> bool:
    """Whether a name is one of lorafast's for what is not finished."""
    return name.startswith(".lorafast") or (name.startswith(".") and name.endswith(".partial"))


def model_files(output: Path) -> dict[str, str]:
    """The digests of a directory's files, but for reports, staging and others' files."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        ignored = is_temporary(name.split("/")[0]) or name in {*REPORTS, MANIFEST}
        if not ignored and name not in BYSTANDERS and not path.is_dir():
            found[name] = digest(path)
    return found


class Scene:
    """Everything one merge reads and may write, below one folder.

    The old model was made of another base with more shards and a chat template, so that whatever
    of it stays beside the new one shows.
    """

    def __init__(
        self,
        folder: Path,
        *,
        modules: dict[str, tuple[int, int]] | None = None,
        rank: int = 4,
        pipeline: bool = False,
    ) -> None:
        modules = modules or SMALL
        self.rank = rank
        self.folder = folder
        #: Without which no loader takes a directory for a model.
        self.mark = "model_index.json" if pipeline else "config.json"
        if pipeline:
            modules = prefixed("unet.", UNET) | prefixed("text_encoder.", CLIP_L)
            self.base = make_pipeline(folder / "base", dtype="BF16", shards={"unet": 2})
            third = {"text_encoder_3": SDXL["text_encoder"]}
            earlier = make_pipeline(folder / "earlier", SDXL | third, shards={"unet": 3})
        else:
            self.base = make_base(folder / "base", modules=modules, shards=3, dtype="BF16", seed=1)
            earlier = make_base(folder / "earlier", modules=modules, shards=4, dtype="BF16", seed=2)
            (earlier / "chat_template.jinja").write_text("{{ messages }}")
        self.earlier = earlier
        self.adapter = self._adapter("adapter", modules, 3)
        self.other = self._adapter("other", modules, 4)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        (self.elsewhere / "precious.txt").write_text("not lorafast's")
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.runs = folder / "runs"
        self.runs.mkdir()
        self.output = self.runs / "out"
        self.saved = {
            "old": self._reference("old", earlier, self.other),
            "new": self._reference("new", self.base, self.adapter),
        }
        self.models = {kind: model_files(path) for kind, path in self.saved.items()}
        self._inputs = self._snapshot()

    def _adapter(self, name: str, modules: dict[str, tuple[int, int]], seed: int) -> Path:
        tensors = adapter_tensors(modules, rank=self.rank, seed=seed)
        return make_adapter(self.folder / name, tensors, r=self.rank)

    def _reference(self, kind: str, base: Path, adapter: Path) -> Path:
        path = self.folder / "references" / kind
        outcome = self.run(self.merge(base=base, adapters=[adapter], output=path))
        assert outcome.code == 0, outcome.err
        return path

    def _snapshot(self) -> dict[str, str]:
        parts = (self.base, self.earlier, self.adapter, self.other, self.elsewhere)
        return {
            f"{part.name}/{name}": found for part in parts for name, found in snapshot(part).items()
        }

    def merge(
        self,
        *more: Argument,
        base: Path | None = None,
        adapters: Sequence[Path] | None = None,
        output: Path | None = None,
    ) -> list[Argument]:
        """The arguments of the merge that makes the new model, or of another."""
        return [
            "merge",
            "--base",
            base or self.base,
            "--adapters",
            *(adapters or [self.adapter]),
            "--output",
            output or self.output,
            "--quiet",
            *more,
        ]

    def run(self, arguments: Sequence[Argument], limit: float = 60.0) -> Outcome:
        return lorafast(*arguments, temporary=self.temporary, directory=self.folder, limit=limit)

    def recover(self) -> Outcome:
        """Finish or take back what a killed merge left in the output."""
        return self.run(["recover", self.output])

    def reset(self, kind: str = "absent") -> None:
        """Make the output absent, or the old model among others' files."""
        shutil.rmtree(self.runs, ignore_errors=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.runs.mkdir()
        self.temporary.mkdir()
        if kind != "absent":
            shutil.copytree(self.saved[kind], self.output)
            for name, content in BYSTANDERS.items():
                (self.output / name).write_bytes(content)

    def state(self, output: Path | None = None) -> str:
        """What the output is: "absent", "old", "new", "middle", or "WRONG" and why."""
        output = output or self.output
        if not output.exists():
            return "absent"
        found = model_files(output)
        is_committing = (output / STAGING / "commit.json").exists()
        if not found:
            # All of the old model may have moved aside, and nothing of the new one in its place.
            return "middle" if is_committing else "absent"
        for kind, files in self.models.items():
            if found == files:
                return kind
        if is_committing:
            # Nothing loads a model without its config, and lorafast refuses it for the journal.
            if self.mark not in found:
                return "middle"
            return "WRONG: a loader takes it for a model in the middle of a commit"
        return f"WRONG: neither model whole: {self._difference(found)}"

    def _difference(self, found: dict[str, str]) -> str:
        def against(kind: str) -> tuple[int, str]:
            files = self.models[kind]
            parts = [f"without {name}" for name in files if name not in found]
            parts += [f"another {n}" for n in files if n in found and found[n] != files[n]]
            parts += [f"beside {name}" for name in found if name not in files]
            return len(parts), f"{kind} " + ", ".join(parts)

        return min(map(against, self.models))[1]

    def intact(self, *, bystanders: bool) -> list[str]:
        """What was changed that is not the merge's: inputs, and others' files in the output."""
        found = []
        now = self._snapshot()
        if now != self._inputs:
            both = {*now, *self._inputs}
            changed = sorted(n for n in both if now.get(n) != self._inputs.get(n))
            found.append(f"changed {', '.join(changed)}")
        for name, content in BYSTANDERS.items() if bystanders else ():
            path = self.output / name
            if not path.is_file() or path.read_bytes() != content:
                found.append(f"lost or changed another's {name}")
        return found

    def leftovers(self) -> list[str]:
        """Files of lorafast that nothing needs any more, by name."""
        found = [f"temporary {path.name}" for path in self.temporary.iterdir()]
        places = [self.runs, self.output] if self.output.is_dir() else [self.runs]
        for place in places:
            found += [p.name for p in place.iterdir() if is_temporary(p.name)]
        found += [path.name for path in self.runs.iterdir() if path != self.output]
        return [f"left {name}" for name in found]

    def accounts(self) -> list[str]:
        """Whether report and manifest, where they are, belong to the model that is there."""
        kind = self.state()
        if kind not in self.models:
            return []
        found = []
        report = self.output / "merge_report.json"
        if report.is_file():
            merged = self.adapter if kind == "new" else self.other
            attested = list(json.loads(report.read_text())["adapter_sha256"].values())
            if attested != [digest(merged / "adapter_model.safetensors")]:
                found.append(f"the report beside the {kind} model tells of another adapter")
        manifest = self.output / MANIFEST
        if manifest.is_file():
            found += [
                f"the manifest gives {name} {size} bytes"
                for name, size in manifest_sizes(manifest).items()
                if not (self.output / name).is_file() or (self.output / name).stat().st_size != size
            ]
        return found


def manifest_sizes(manifest: Path) -> dict[str, int]:
    """The files that a manifest lists, with their sizes."""
    files = json.loads(manifest.read_text())["files"]
    if isinstance(files, dict):
        entries = [
            {"name": n, **(v if isinstance(v, dict) else {"bytes": v})} for n, v in files.items()
        ]
    else:
        entries = files
    return {entry["name"]: entry.get("bytes", entry.get("size")) for entry in entries}


def other_values(file: Path, target: Path, seed: int) -> None:
    """Write a file with the same header and other small values of the same number formats."""
    random = np.random.default_rng(seed)
    old = read_safetensors(file)
    new = {
        name: tensor(random.normal(scale=0.05, size=value.shape), value.dtype)
        for name, value in old.items()
    }
    target.write_bytes(file.read_bytes()[: -sum(len(v.data) for v in new.values())])
    with target.open("ab") as stream:
        for value in new.values():
            stream.write(value.data)

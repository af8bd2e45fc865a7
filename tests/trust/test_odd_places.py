"""Links, pipes, sockets, devices, modes and names, in base, adapter and output."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.handmade import make_adapter, make_base
from support.trust.command import Argument, Outcome, lorafast
from support.trust.figures import Figures
from support.trust.scene import MANIFEST, STAGING

#: Seconds in which each of these tiny merges ends, or hangs.
LIMIT = 20
SECRET = "no model's"


class UnsuitableError(Exception):
    """This machine cannot show it."""


@dataclass
class Place:
    """A fresh base, adapter and output, and a file of somebody else's."""

    folder: Path
    base: Path = field(init=False)
    adapter: Path = field(init=False)
    output: Path = field(init=False)
    precious: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        # Others than root come here too.
        self.folder.chmod(0o777)
        self.base = make_base(self.folder / "base", shards=3)
        self.adapter = make_adapter(self.folder / "adapter")
        self.output = self.folder / "out"
        self.precious = self.folder / "precious"
        self.precious.write_text(SECRET)

    def merge(
        self, *more: Argument, before: Sequence[Argument] = (), limit: float = LIMIT, **how: object
    ) -> Outcome:
        places = how.pop("places", (self.base, self.adapter, self.output))
        base, adapter, output = places
        outcome = lorafast(
            "merge", "--base", base, "--adapters", adapter, "--output", output, "--quiet", *more,
            before=before, limit=limit, directory=self.folder, **how,
        )  # fmt: skip
        assert self.precious.read_text() == SECRET, "wrote through a link"
        return outcome

    def earlier(self) -> dict[str, bytes]:
        """Puts another model into the output."""
        before = make_adapter(self.folder / "before", r=2, lora_alpha=2)
        done(lorafast("merge", "--base", self.base, "--adapters", before, "--output", self.output))
        return contents(self.output)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and STAGING not in path.parts
    }


def done(outcome: Outcome) -> Outcome:
    assert outcome.problems(0) == []
    return outcome


def refused(outcome: Outcome, *says: str) -> Outcome:
    assert outcome.problems(1) == []
    for text in says:
        assert text in outcome.last, f"{text!r} is not in {outcome.last!r}"
    return outcome


def bound(path: Path) -> socket.socket:
    """A socket under that name, however long its path is."""
    made = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        made.bind(path.name)
    finally:
        os.chdir(here)
    return made


# What is no plain file.


def pipe_under_a_models_name(place: Place) -> None:
    shard = place.base / "model-00002-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    refused(place.merge(), "pipe")
    refused(lorafast("inspect", place.base, limit=LIMIT), "pipe")
    assert not place.output.exists()


def pipe_as_a_file(place: Place) -> None:
    path = place.folder / "model.safetensors"
    os.mkfifo(path)
    refused(lorafast("inspect", path, limit=LIMIT), "pipe")
    refused(place.merge(places=(path, place.adapter, place.output)), "pipe")


def pipe_beside_a_base(place: Place) -> None:
    os.mkfifo(place.base / "tokenizer_config.json")
    outcome = place.merge()
    assert outcome.problems(0, 1) == []
    assert not (place.output / "tokenizer_config.json").is_fifo()


def pipe_for_an_adapters_file(place: Place) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        kept = (place.adapter / name).read_bytes()
        (place.adapter / name).unlink()
        os.mkfifo(place.adapter / name)
        refused(place.merge(), "pipe")
        for command in ("inspect", "analyze", "scan", "similarity", "duplicates"):
            outcome = lorafast(command, place.adapter, limit=LIMIT)
            # A fleet lists what cannot be read in its own way.
            assert outcome.code in {0, 1}, command
            assert "Traceback" not in outcome.err, command
        (place.adapter / name).unlink()
        (place.adapter / name).write_bytes(kept)


def socket_under_a_models_name(place: Place) -> None:
    shard = place.base / "model-00002-of-00003.safetensors"
    shard.unlink()
    with bound(shard):
        refused(place.merge(), "socket")


def device_under_a_models_name(place: Place) -> None:
    for name, device in (("tokenizer.json", "/dev/zero"), ("config.json", "/dev/zero")):
        kept = (place.base / name).read_bytes()
        (place.base / name).unlink()
        (place.base / name).symlink_to(device)
        outcome = place.merge("--overwrite")
        assert outcome.problems(0, 1) == [], name
        (place.base / name).unlink()
        (place.base / name).write_bytes(kept)
    weights = place.adapter / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to("/dev/zero")
    refused(place.merge("--overwrite"), "device")


def output_that_is_no_directory(place: Place) -> None:
    os.mkfifo(place.output)
    refused(place.merge("--overwrite"), str(place.output))
    assert place.output.is_fifo()
    place.output.unlink()
    place.output.write_text(SECRET)
    refused(place.merge("--overwrite"), str(place.output))
    assert place.output.read_text() == SECRET
    refused(place.merge(places=(place.base, place.adapter, "/dev/null")), "/dev/null")


# What is carried from a base.


def others_files_in_a_base(place: Place) -> None:
    kept = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
    for name in kept:
        (place.base / name).write_text("{}")
    for name in (".env", ".ssh/id_rsa", ".cache/x", "checkpoint-500/optimizer.pt"):
        (place.base / name).parent.mkdir(parents=True, exist_ok=True)
        (place.base / name).write_text(SECRET)
    make_base(place.base / "checkpoint-9")
    (place.base / "passwords.json").symlink_to(place.precious)
    (place.base / "home").symlink_to(place.folder)
    done(place.merge())
    found = contents(place.output)
    assert set(kept) <= set(found)
    carried = [name for name, content in found.items() if SECRET.encode() in content]
    assert carried == []
    strange = [name for name in found if "/" in name or name.startswith(".")]
    assert strange == []
    refused(place.merge(), "not empty")


def side_file_that_leads_nowhere(place: Place) -> None:
    for name in ("tokenizer.json", "config.json"):
        kept = (place.base / name).read_bytes()
        (place.base / name).unlink()
        (place.base / name).symlink_to("../blobs/missing")
        refused(place.merge(), name)
        assert not place.output.exists()
        (place.base / name).unlink()
        (place.base / name).write_bytes(kept)


def hub_snapshot(place: Place) -> None:
    """Its files are links into the blobs beside it: they are carried, as files."""
    blobs = place.folder / "models--a--b" / "blobs"
    snapshot = place.folder / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in place.base.iterdir():
        (blobs / f"blob-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    done(place.merge(places=(snapshot, place.adapter, place.output)))
    assert (place.output / "tokenizer.json").read_bytes() == (
        place.base / "tokenizer.json"
    ).read_bytes()
    assert not any(path.is_symlink() for path in place.output.iterdir())


def modes_of_a_base(place: Place) -> None:
    for shard in place.base.glob("*.safetensors"):
        shard.chmod(0o640)
    done(place.merge())
    modes = {oct(path.stat().st_mode & 0o777) for path in place.output.glob("*.safetensors")}
    assert modes == {"0o640"}


# What lies where the output is written.


def staging_that_is_a_link(place: Place) -> None:
    target = place.folder / "target"
    target.mkdir()
    (target / "mine").write_text(SECRET)
    (target / "model").mkdir()
    (target / "model" / "mine").write_text(SECRET)
    for overwrite in (False, True):
        shutil.rmtree(place.output, ignore_errors=True)
        place.output.mkdir()
        (place.output / STAGING).symlink_to(target)
        outcome = place.merge(*(("--overwrite",) if overwrite else ()))
        assert outcome.problems(0, 1) == []
        assert contents(target) == {"mine": SECRET.encode(), "model/mine": SECRET.encode()}


def fixed_names_that_are_links(place: Place) -> None:
    names = (
        "lock", "commit.json", "model", "model/config.json", "report", "merge_report.json",
        "merge_report.json.partial", "lorafast_manifest.json",
    )  # fmt: skip
    for name in names:
        for kind in ("staging", "output"):
            shutil.rmtree(place.output, ignore_errors=True)
            path = (place.output / STAGING if kind == "staging" else place.output) / name
            path.parent.mkdir(parents=True)
            path.symlink_to(place.precious)
            outcome = place.merge("--overwrite")
            assert outcome.problems(0, 1) == [], (kind, name)
            shown = place.folder / "shown"
            done(lorafast("analyze", place.adapter, "--output", shown, "--no-plots", "--quiet"))
            shutil.rmtree(shown)


def model_files_that_are_links(place: Place) -> None:
    """A link is replaced, and what it leads to is left alone."""
    place.earlier()
    for name in ("config.json", "merge_report.json", "model-00001-of-00003.safetensors"):
        (place.output / name).unlink(missing_ok=True)
        (place.output / name).symlink_to(place.precious)
    outcome = place.merge("--overwrite")
    assert outcome.problems(0, 1) == []
    if outcome.code == 0:
        assert not (place.output / "config.json").is_symlink()


def directory_under_a_side_files_name(place: Place) -> None:
    for name in ("tokenizer.json", "config.json", "model-00002-of-00003.safetensors", MANIFEST):
        shutil.rmtree(place.output, ignore_errors=True)
        shutil.rmtree(place.folder / "before", ignore_errors=True)
        place.earlier()
        (place.output / name).unlink(missing_ok=True)
        (place.output / name).mkdir()
        (place.output / name / "mine").write_text(SECRET)
        before = contents(place.output)
        refused(place.merge("--overwrite"), name)
        assert contents(place.output) == before, name


def immutable_file_of_the_older_model(place: Place) -> None:
    for name in ("config.json", "model-00002-of-00003.safetensors", "tokenizer.json"):
        shutil.rmtree(place.output, ignore_errors=True)
        shutil.rmtree(place.folder / "before", ignore_errors=True)
        before = place.earlier()
        path = place.output / name
        if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
            raise UnsuitableError("chattr +i does not work here")
        try:
            outcome = place.merge("--overwrite")
            after = contents(place.output)
        finally:
            subprocess.run(["chattr", "-i", path], check=True)
        refused(outcome, str(place.output))
        assert after == before, name


def base_whose_shards_are_links_into_the_output(place: Place) -> None:
    """What is overwritten must not be what is read, under whatever name."""
    for link in (os.symlink, os.link):
        shutil.rmtree(place.output, ignore_errors=True)
        shutil.rmtree(place.folder / "before", ignore_errors=True)
        place.earlier()
        base = place.folder / f"{link.__name__}ed"
        base.mkdir()
        for path in place.output.iterdir():
            if path.suffix == ".safetensors":
                link(path, base / path.name)
            else:
                (base / path.name).write_bytes(path.read_bytes())
        before = contents(base)
        outcome = place.merge("--overwrite", places=(base, place.adapter, place.output))
        if link is os.symlink:
            refused(outcome, str(place.output))
        assert outcome.problems(0, 1) == []
        assert contents(base) == before, f"changed a base that is {link.__name__}ed"


def folder_of_loras_as_output(place: Place) -> None:
    place.output.mkdir()
    for name in ("style.safetensors", "facts.safetensors"):
        (place.output / name).write_text(SECRET)
    outcome = place.merge("--overwrite")
    assert outcome.problems(0, 1) == []
    for name in ("style.safetensors", "facts.safetensors"):
        assert (place.output / name).read_text() == SECRET


def output_that_is_a_link(place: Place) -> None:
    target = place.folder / "target"
    target.mkdir()
    place.output.symlink_to(target)
    outcome = place.merge()
    assert outcome.problems(0, 1) == []
    assert place.output.is_symlink()
    if outcome.code == 0:
        assert (target / "config.json").is_file()
    place.output.unlink()
    place.output.symlink_to("nowhere")
    refused(place.merge(), str(place.output))


# Who may do what.


def as_nobody() -> list[Argument]:
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise UnsuitableError("setpriv is needed to be nobody")
    before: list[Argument] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    can = subprocess.run(
        [*before, sys.executable, "-c", "import lorafast"], capture_output=True, check=False
    )
    if can.returncode:
        raise UnsuitableError("nobody cannot read this installation")
    return before


def directories_that_are_read_only(place: Place) -> None:
    before = as_nobody()
    place.output.mkdir()
    place.output.chmod(0o555)
    refused(place.merge(before=before), str(place.output), "ermission")
    assert list(place.output.iterdir()) == []
    place.output.chmod(0o777)
    for part in (place.base, place.adapter):
        part.chmod(0o555)
    done(place.merge(before=before))
    for part in (place.base, place.adapter):
        part.chmod(0o755)


def inputs_that_may_not_be_read(place: Place) -> None:
    before = as_nobody()
    paths = [
        place.base / "model-00002-of-00003.safetensors", place.base / "config.json",
        place.base / "tokenizer.json", place.adapter / "adapter_config.json",
        place.adapter / "adapter_model.safetensors", place.adapter, place.base,
    ]  # fmt: skip
    for path in paths:
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            refused(place.merge(before=before), path.name, "ermission")
        finally:
            path.chmod(mode)
        assert not place.output.exists(), path.name


def older_model_of_somebody_else(place: Place) -> None:
    before = as_nobody()
    earlier = place.earlier()
    place.output.chmod(0o755)
    refused(place.merge("--overwrite", before=before), str(place.output), "ermission")
    assert contents(place.output) == earlier


def few_open_files(place: Place) -> None:
    """Shards are open at the same time; the limit is raised where the system lets it be."""
    modules = {f"model.layers.{n}.mlp.up_proj": (4, 20) for n in range(200)}
    base = make_base(place.folder / "many", modules=modules, shards=200)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 1024:
        raise UnsuitableError("the hard limit of open files is too low")
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # noqa: E731
    from support.handmade import adapter_tensors

    adapter = make_adapter(place.folder / "wide", adapter_tensors(modules))
    done(place.merge(places=(base, adapter, place.output), prepare=few))


# Names.


def odd_names(place: Place) -> None:
    names = [
        b"new\nline",
        b"not \xff utf-8",
        b"x" * 255,
        b"-x",
        b"sp ace",
        b"q'uo\"te",
        b"\x1b[31m",
    ]
    for raw in names:
        name = os.fsdecode(raw)
        base, adapter, output = (place.folder / part / name for part in ("b", "a", "o"))
        shutil.copytree(place.base, base)
        shutil.copytree(place.adapter, adapter)
        output.parent.mkdir(exist_ok=True)
        outcome = place.merge(places=(base, adapter, output))
        assert outcome.problems(0, 1) == [], raw
        if outcome.code == 0:
            assert (output / "config.json").is_file(), raw
        assert "\x1b" not in outcome.err + outcome.out
        again = place.merge(places=(base, adapter, output))
        assert again.problems(0, 1) == [], name
        for command in ("inspect", "analyze", "scan"):
            outcome = lorafast(command, adapter, limit=LIMIT)
            assert outcome.code in {0, 1, 2}, (command, name, outcome.err)
            assert "Traceback" not in outcome.err, (command, name)


def leading_dash(place: Place) -> None:
    done(place.merge(places=("base", "adapter", "./-out")))
    assert (place.folder / "-out" / "config.json").is_file()


def home_in_an_output(place: Place) -> None:
    home = place.folder / "home"
    home.mkdir()
    done(place.merge(places=(place.base, place.adapter, "~/out"), more={"HOME": str(home)}))
    assert (home / "out" / "config.json").is_file()
    assert not (place.folder / "~").exists()


SCENARIOS = [
    pipe_under_a_models_name, pipe_as_a_file, pipe_beside_a_base, pipe_for_an_adapters_file,
    socket_under_a_models_name, device_under_a_models_name, output_that_is_no_directory,
    others_files_in_a_base, side_file_that_leads_nowhere, hub_snapshot, modes_of_a_base,
    staging_that_is_a_link, fixed_names_that_are_links, model_files_that_are_links,
    directory_under_a_side_files_name, immutable_file_of_the_older_model,
    base_whose_shards_are_links_into_the_output, folder_of_loras_as_output,
    output_that_is_a_link, directories_that_are_read_only, inputs_that_may_not_be_read,
    older_model_of_somebody_else, few_open_files, odd_names, leading_dash, home_in_an_output,
]  # fmt: skip


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others than root reach, as they do not reach pytest's own."""
    with tempfile.TemporaryDirectory(prefix="lorafast-trust-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_odd_places_neither_hang_nor_lose_anything(
    open_folder: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("odd places")
    for scenario in SCENARIOS:
        name = scenario.__name__.replace("_", " ")
        place = Place(open_folder / scenario.__name__)
        try:
            scenario(place)
        except UnsuitableError as reason:
            told.add("skipped")
            told.counts[f"({name}: {reason})"] += 1
        except (AssertionError, OSError, ValueError) as error:
            text = " ".join(str(error).split())
            told.add("failed")
            told.wrong.append(f"{name}: {text[:300]}")
        else:
            told.add("right")
    told.settle()


def test_a_link_that_is_written_through_is_noticed(tmp_path: Path) -> None:
    """The judge itself."""
    place = Place(tmp_path / "place")
    place.precious.write_text("changed")
    with pytest.raises(AssertionError, match="wrote through a link"):
        place.merge("--dry-run")

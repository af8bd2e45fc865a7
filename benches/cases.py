"""What the merges are timed on: each case makes its inputs and says what is compared with what."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lorafast
import numpy as np
import ways
from inputs import (
    ALL_LINEAR,
    DTYPES,
    Shape,
    make_adapter,
    make_checkpoint,
    make_model,
    write_adapter,
)
from reflinks import loop_mount, shared_share
from ways import Way


@dataclass
class Setup:
    """Ways that are run in turn, round by round.

    Attributes:
        title: what is merged.
        ways: in the order of a round.
        inputs: what is read into the cache, or dropped from it, before each run.
        compared: pairs of ways, and the ratio that is asked for.
        cold: whether the inputs are dropped from the cache before each run.
        copying: flags that make cp copy.
        compare_with_peft: the merged tensors that are held against PEFT's.
        after: says something of an output of lorafast's that is still there.
    """

    title: str
    ways: list[Way]
    inputs: list[Path]
    compared: list[tuple[str, str, float | None]]
    cold: bool = False
    copying: tuple[str, ...] = ()
    compare_with_peft: list[str] = field(default_factory=list)
    after: Callable[[Path], str] | None = None


@dataclass(frozen=True)
class Case:
    """A name on the command line, what it shows, and its setups, made one by one in a folder."""

    name: str
    about: str
    setups: Callable[[argparse.Namespace, Path], Iterator[Setup]]


PEFT_FLOOR = 20.0
#: lorafast / cp by rank, of whole processes.
LINEAR = {16: 1.0, 64: 1.25, 256: 2.0}
#: Exact sums / the default by rank.
EXACT = {16: 1.3, 256: 2.2}
#: Llamas and Qwens of about so many 10⁹ parameters.
SIZES = {
    "0.5": Shape(896, 24, 4864, 14, 2, 151936, True),
    "1.2": Shape(2048, 16, 8192, 32, 8, 128256, True),
    "3.2": Shape(3072, 28, 8192, 24, 8, 128256, True),
    "8.0": Shape(4096, 32, 14336, 32, 8, 128256, False),
}
SHARD_BYTES = 5e9


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(
        options.hidden,
        options.layers,
        options.intermediate,
        options.heads,
        options.key_value_heads,
        options.vocabulary,
        not options.untied,
    )


def operations_of(shape: Shape, targets: list[str], rank: int) -> float:
    sizes = shape.linear().items()
    elements = sum(int(np.prod(s)) for name, s in sizes if name.split(".")[-1] in targets)
    return 2.0 * rank * shape.layers * elements


def _base(options: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    base = folder / "base"
    dtype = DTYPES[options.base_dtype]
    return base, make_checkpoint(base, shape_of(options), dtype, options.shards)


def _adapter(
    options: argparse.Namespace, path: Path, targets: list[str], rank: int, seed: int = 2
) -> Path:
    dtype = DTYPES[options.adapter_dtype]
    make_adapter(path, shape_of(options), targets, rank=rank, dtype=dtype, seed=seed)
    return path


def _against_rivals(
    options: argparse.Namespace,
    folder: Path,
    base: tuple[Path, int],
    *,
    targets: list[str],
    rank: int,
    limits: tuple[float | None, float | None],
    title: str,
    copying: tuple[str, ...] = (),
) -> Setup:
    """One adapter: the whole process and the call against cp and what else was asked for."""
    path, size = base
    operations = operations_of(shape_of(options), targets, rank)
    adapter = _adapter(options, folder / f"adapter-{rank}", targets, rank)
    merge = (path, [adapter], size, operations)
    made = [
        ways.copy(path, size, *copying),
        ways.copy_synced(path, size, *copying),
        ways.lorafast(*merge, threads=options.threads, name="lorafast"),
        ways.lorafast(*merge, threads=options.threads, name="lorafast, synced", synced=True),
        ways.in_process(*merge, threads=options.threads, scratch=folder / "first"),
    ]
    compared = [
        ("lorafast", "cp", limits[0]),
        ("lorafast, synced", "cp, synced", None),
        ("in process", "cp", limits[1]),
    ]
    if lorafast.build_info()["amx"]:
        made.append(
            ways.lorafast(*merge, threads=options.threads, name="with AMX", device="cpu:amx")
        )
        compared.append(("with AMX", "cp", limits[0]))
    setup = Setup(title, made, [path, adapter], compared)
    if "peft" in options.rivals:
        made.append(ways.peft(*merge))
        compared.append(("PEFT", "lorafast", PEFT_FLOOR))
        setup.compare_with_peft = [
            f"model.layers.{layer}.{linear}.weight"
            for layer in sorted({0, options.layers - 1})
            for linear in shape_of(options).linear()
            if linear.split(".")[-1] in targets
        ]
    if "mergekit" in options.rivals:
        made.append(ways.mergekit(*merge))
        compared.append(("mergekit", "lorafast", None))
    return setup


def linear(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    base = _base(options, folder)
    targets = ALL_LINEAR.split(",")
    for rank in options.ranks:
        limits = (LINEAR.get(rank), 0.85 if rank == 16 else None)
        yield _against_rivals(
            options,
            folder,
            base,
            targets=targets,
            rank=rank,
            limits=limits,
            title=f"rank {rank}",
        )


def attention(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    base = _base(options, folder)
    targets = ["q_proj", "v_proj"]
    title = "q_proj and v_proj, rank 16"
    yield _against_rivals(
        options, folder, base, targets=targets, rank=16, limits=(1.0, None), title=title
    )


def reflink(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    shape = shape_of(options)
    size = 2 * sum(int(np.prod(s)) for _, s in shape.tensors())
    copying = ("--reflink=never",)  # cp would share the blocks, and copy nothing
    for kind in options.file_systems:
        with loop_mount(kind, 6 * size + (1 << 30), folder) as place:
            base = _base(options, place)
            targets = ["q_proj", "v_proj"]
            title = f"{kind}, q_proj and v_proj, rank 16"
            setup = _against_rivals(
                options,
                place,
                base,
                targets=targets,
                rank=16,
                limits=(0.9, None),
                title=title,
                copying=copying,
            )
            setup.ways.append(ways.copy(*base, "--reflink=always", name="cp, reflinked"))
            setup.copying = copying
            setup.after = lambda output: (
                f"{shared_share(output) or 0.0:.0%} of the output's blocks are the base's"
            )
            yield setup


def exact(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    base, size = _base(options, folder)
    targets = ALL_LINEAR.split(",")
    for rank in options.ranks:
        adapter = _adapter(options, folder / f"adapter-{rank}", targets, rank)
        merge = (base, [adapter], size, operations_of(shape_of(options), targets, rank))
        kinds = {"lorafast": [], "exact": ["exact"], "exact, hashed": ["exact", "reported"]}
        made = [
            ways.lorafast(
                *merge,
                threads=options.threads,
                name=name,
                precision="exact" if kind else "default",
                report="reported" in kind,
            )
            for name, kind in kinds.items()
        ]
        compared = [
            ("exact", "lorafast", EXACT.get(rank)),
            ("exact, hashed", "lorafast", None),
        ]
        yield Setup(f"exact sums, rank {rank}", made, [base, adapter], compared)


def adapters(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    base, size = _base(options, folder)
    targets = ALL_LINEAR.split(",")
    most = max(options.counts)
    made = [
        _adapter(options, folder / f"adapter-{number}", targets, 16, 2 + number)
        for number in range(most)
    ]
    one = _adapter(options, folder / "adapter-one", targets, 16 * most)
    timed = [ways.copy(base, size)]
    compared: list[tuple[str, str, float | None]] = []
    for count in options.counts:
        operations = operations_of(shape_of(options), targets, 16 * count)
        name = f"{count} of rank 16"
        merge = (base, made[:count], size, operations)
        timed.append(ways.lorafast(*merge, threads=options.threads, name=name))
        compared.append((name, "cp", None))
    name = f"one of rank {16 * most}"
    whole = (base, [one], size, timed[-1].operations)
    timed.append(ways.lorafast(*whole, threads=options.threads, name=name))
    # The same sum of ranks in one adapter: no pass over the base more.
    compared.append((f"{most} of rank 16", name, None))
    yield Setup("adapters in one pass", timed, [base, *made, one], compared)


def sizes(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    targets = ALL_LINEAR.split(",")
    for name in options.sizes:
        shape = SIZES[name]
        parameters = sum(int(np.prod(s)) for _, s in shape.tensors())
        base, adapter = folder / f"base-{name}", folder / f"adapter-{name}"
        shards = max(1, round(2 * parameters / SHARD_BYTES))
        size = make_checkpoint(base, shape, "BF16", shards, sparse=True)
        make_adapter(adapter, shape, targets, rank=16, dtype="F32", seed=2)
        merge = (base, [adapter], size, operations_of(shape, targets, 16))
        timed = [
            # Holes would be skipped, and nothing copied.
            ways.copy(base, size, "--sparse=never"),
            ways.lorafast(*merge, threads=options.threads, name="lorafast"),
        ]
        title = f"{parameters / 1e9:.2f} B parameters, sparse base, rank 16"
        yield Setup(
            title,
            timed,
            [base, adapter],
            [("lorafast", "cp", None)],
            copying=("--sparse=never",),
        )
        shutil.rmtree(base)
        shutil.rmtree(adapter)


def cold(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    base = _base(options, folder)
    targets = ALL_LINEAR.split(",")
    setup = _against_rivals(
        options, folder, base, targets=targets, rank=16, limits=(None, None), title="cold, rank 16"
    )
    setup.cold = True
    yield setup


def forms(options: argparse.Namespace, folder: Path) -> Iterator[Setup]:
    """As many bytes of each kind of weight, every one of them changed."""
    rank, elements = 16, options.form_elements
    rows, columns = 4096, 2048
    linears = {f"layers.{n}.proj": (rows, columns) for n in range(elements // (rows * columns))}
    channels = 1024
    convolutions = {
        f"blocks.{n}.conv": (channels, channels, 3, 3)
        for n in range(round(elements / (channels * channels * 9)))
    }
    table = {"embed_tokens": (elements // columns, columns)}
    kinds = {
        "linear": (linears, "proj", {"lora_A.weight": ("rank", 1), "lora_B.weight": (0, "rank")}),
        "DoRA": (
            linears,
            "proj",
            {
                "lora_A.weight": ("rank", 1),
                "lora_B.weight": (0, "rank"),
                "lora_magnitude_vector": (0,),
            },
        ),
        "embedding": (
            table,
            "embed_tokens",
            {"lora_embedding_A": ("rank", 0), "lora_embedding_B": (1, "rank")},
        ),
        "convolution": (
            convolutions,
            "conv",
            {"lora_A.weight": ("rank", 1, 2, 3), "lora_B.weight": (0, "rank", "one", "one")},
        ),
    }
    named = {"rank": rank, "one": 1}
    timed: list[Way] = []
    inputs: list[Path] = []
    for kind, (modules, target, factors) in kinds.items():
        base, adapter = folder / f"base-{kind}", folder / f"adapter-{kind}"
        weights: dict[str, tuple[int, ...]] = {f"{m}.weight": s for m, s in modules.items()}
        size = make_model(base, weights, {"torch_dtype": "bfloat16"}, "BF16", 1)
        tensors = {
            f"base_model.model.{module}.{factor}": tuple(
                named[extent] if isinstance(extent, str) else shape[extent] for extent in extents
            )
            for module, shape in modules.items()
            for factor, extents in factors.items()
        }
        adapter.mkdir()
        write_adapter(
            adapter, tensors, [target], rank=rank, dtype="F32", seed=2, dora=kind == "DoRA"
        )
        operations = 2.0 * rank * size / 2
        merge = (base, [adapter], size, operations)
        timed.append(ways.lorafast(*merge, threads=options.threads, name=kind))
        inputs += [base, adapter]
        if kind == "linear":
            timed.insert(0, ways.copy(base, size))
    compared = [(kind, "linear", 1.5) for kind in kinds if kind != "linear"]
    yield Setup(f"forms, rank {rank}", timed, inputs, [("linear", "cp", None), *compared])


CASES = {
    case.name: case
    for case in (
        Case("linear", "every linear layer, by rank", linear),
        Case("attention", "q_proj and v_proj alone", attention),
        Case("exact", "sums of real numbers, rounded once, by rank", exact),
        Case("adapters", "several adapters of rank 16 in one pass", adapters),
        Case("sizes", "time and memory from 0.5 to 8 B parameters", sizes),
        Case("forms", "DoRA, embeddings, convolutions beside linear layers", forms),
        Case("cold", "the page cache dropped before each run", cold),
        Case("reflink", "the attention case on a file system with reflinks; as root", reflink),
    )
}

"""Many merges in one process, each proved, with descriptors and memory that do not grow."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import read_checkpoint, snapshot
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import merge_float64
from support.trust.figures import Figures, count, generator
from support.trust.scene import MANIFEST, REPORTS, STAGING, model_files

#: Bytes by which a process may grow after its first fifth: the allocator's own doing.
GROWTH = 32_000_000


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.alone
def test_many_merges_are_all_right_and_leave_no_trace(
    tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("many merges")
    random = generator("many merges")
    bases = [
        make_base(tmp_path / f"base{n}", shards=n % 3 + 1, dtype=dtype, seed=n)
        for n, dtype in enumerate(("F32", "BF16", "F16"))
    ]
    adapters = [
        make_adapter(
            tmp_path / f"adapter{n}", adapter_tensors(rank=rank, seed=n, dtype=dtype),
            r=rank, lora_alpha=alpha, use_rslora=n == 2,
        )
        for n, (rank, alpha, dtype) in enumerate([(4, 8, "F32"), (2, 1, "BF16"), (8, 16, "F16")])
    ]  # fmt: skip
    inputs = {path: snapshot(path) for path in (*bases, *adapters)}
    first: dict[tuple[object, ...], str] = {}
    total = count("many_merges", 20)
    before = (open_files(), resident())
    for number in range(total):
        base = random.choice(bases)
        chosen = [random.choice(adapters) for _ in range(random.randint(1, 3))]
        strategy = random.choice(("sequential", "weighted", "average"))
        weights = None
        if strategy == "weighted":
            weights = [random.choice((-0.5, 0.25, 1.0)) for _ in chosen]
        options: dict[str, Any] = {
            "threads": random.choice((None, 1, 2, 5)),
            "sync": random.random() < 0.2,
            "verify": random.random() < 0.2,
            "report": random.random() < 0.5,
        }
        output = tmp_path / random.choice(("fresh", "existing"))
        exists = output.name == "existing" and output.exists()
        if not exists:
            shutil.rmtree(output, ignore_errors=True)
        where = f"merge {number} ({base.name}, {[a.name for a in chosen]}, {strategy} {weights})"
        lorafast.merge(
            base, chosen, output, strategy=strategy, weights=weights, overwrite=exists, **options
        )
        told.add("over another" if exists else "new")
        made = model_files(output)
        # One digest of all, so that what is remembered does not look like a leak.
        whole = hashlib.sha256(repr(sorted(made.items())).encode()).hexdigest()
        key = (base, tuple(chosen), strategy, tuple(weights or ()))
        if key in first:
            told.expect(whole == first[key], f"{where}: other bytes than the first time")
            told.add("as the first")
        else:
            first[key] = whole
            told.add("as in float64")
            try:
                untouched = read_checkpoint(base)
                merged = read_checkpoint(output)
                terms = merge_float64(untouched, chosen, strategy, weights)
                # Weights this small have few elements: each that is off weighs more.
                assert_merged_like_float64(merged, terms, identical=0.99)
                assert_rest_untouched(merged, untouched, terms)
            except AssertionError as error:
                told.wrong.append(f"{where}: {error!s:.200}")
        names = {path.name for path in output.iterdir()}
        told.expect(STAGING not in names, f"{where}: left {STAGING}")
        beside = names - set(made) - {*REPORTS, MANIFEST}
        told.expect(not beside, f"{where}: left {beside}")
        told.expect(
            options["report"] or not names & set(REPORTS),
            f"{where}: the report of an earlier merge beside the new model",
        )
        if number == total // 5:
            before = (open_files(), resident())
    told.expect(open_files() <= before[0], f"{open_files()} open files, {before[0]} before")
    grown = resident() - before[1]
    told.expect(grown < GROWTH, f"grew by {grown / 1e6:.0f} MB")
    told.counts["grown by MB"] = round(grown / 1e6)
    for path, found in inputs.items():
        told.expect(snapshot(path) == found, f"{path.name} was changed")
    told.settle()

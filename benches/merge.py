"""Time merges against copying the checkpoint, against PEFT, and against the machine's ceilings.

    python benches/merge.py                                 # by rank, 2.5 GB of bfloat16
    python benches/merge.py --case linear --ranks 16 --rivals cp peft --directory /dev/shm
    python benches/merge.py --case attention adapters forms cold --repetitions 5
    python benches/merge.py --layers 2 --vocabulary 32000 --repetitions 3 --json figures.json

The ceilings come first: copying by cp and by threads on the same file system, and what the cores
can multiply and add on registers alone (AMX too, where there is any). Then, case by case,
checkpoints are made of random numbers and adapters in PEFT's format for them, and every way to
make the output is run in turn, round by round, each in its own process:

    cp            cp -r of the checkpoint
    cp, synced    the same, and fsync of what it wrote
    lorafast      the command `lorafast merge --no-sync`, start of Python included
    lorafast, synced   the same as it is by default: the output has reached the disk
    in process    lorafast.merge(sync=False) in a process that has merged before
    PEFT          from_pretrained, merge_and_unload, save_pretrained, imports included
    mergekit      mergekit-yaml of `base+adapter`

For each: seconds, the share of its ceiling (the least time by the copy bandwidth or the f32 peak,
whichever is longer, over the time taken), anonymous memory at its highest (what the process owns;
pages of mapped files belong to the kernel's cache), and the largest resident set. Ratios are taken
round by round. What is printed is Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import CASES, SIZES, Setup
from ceilings import Ceilings, measure_ceilings
from inputs import DTYPES
from measure import Run, cool, processor, resident_share, versions, warm
from ways import identical_share, installed

MODEL_OPTIONS = {
    "--hidden": 2048,
    "--layers": 16,
    "--intermediate": 8192,
    "--heads": 32,
    "--key-value-heads": 8,
    "--vocabulary": 128256,
    "--shards": 2,
}


def run_setup(setup: Setup, folder: Path, options: argparse.Namespace) -> list[str]:
    """Run every way as often as asked for; returns what there is to say of the outputs."""
    said: list[str] = []
    try:
        for number in range(options.repetitions):
            kept: dict[str, Path] = {}
            for position, way in enumerate(setup.ways):
                output = folder / f"out-{position}"
                os.sync()  # what an earlier run has yet to write is not this one's to pay for
                (cool if setup.cold else warm)(setup.inputs)
                share = resident_share(setup.inputs[0])
                run = way.run(output)
                run.resident_share_before = share
                way.runs.append(run)
                last = number == options.repetitions - 1
                if last and setup.after and way.name == "lorafast":
                    os.sync()
                    said.append(setup.after(output))
                if last and setup.compare_with_peft and way.name in {"lorafast", "PEFT"}:
                    kept[way.name] = output
                else:
                    shutil.rmtree(output)
            if len(kept) == 2:
                itemsize = 4 if options.base_dtype == "float32" else 2
                names = setup.compare_with_peft
                same = identical_share(kept["lorafast"], kept["PEFT"], names, itemsize)
                said.append(
                    f"{same:.4%} of the elements of the first and last layer's merged weights are"
                    " the same as PEFT's, bit for bit"
                )
            for output in kept.values():
                shutil.rmtree(output)
    finally:
        for way in setup.ways:
            way.close()
    return said


# Reporting


def ratios(over: list[Run], under: list[Run]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios, round by round."""
    values = [a.seconds / b.seconds for a, b in zip(over, under, strict=True)]
    return statistics.median(values), min(values), max(values)


def highest(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.0f}" if known else "unknown"


def show(setup: Setup, ceilings: Ceilings) -> dict[str, tuple[float, float, float]]:
    print(f"\n### {setup.title}\n")
    print(
        "| Way | median s | least–greatest | GB/s | of its ceiling | anonymous MB | resident MB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for way in setup.ways:
        seconds = [run.seconds for run in way.runs]
        least, bound = ceilings.floor(way.size, way.operations, cold=setup.cold)
        cells = [
            way.name,
            f"{way.median():.3f}",
            f"{min(seconds):.3f}–{max(seconds):.3f}",
            f"{way.size / way.median() / 1e9:.2f}",
            # Sharing blocks has another ceiling than copying them.
            "–" if "reflinked" in way.name else f"{least / way.median():.0%} of {bound}",
            highest([run.anonymous_mb for run in way.runs]),
            highest([run.resident_mb for run in way.runs]),
        ]
        print("|", " | ".join(cells), "|")
    by_name = {way.name: way for way in setup.ways}
    found: dict[str, tuple[float, float, float]] = {}
    print("\n| Ratio, round by round | median | range | target |")
    print("|---|---:|---:|---:|")
    for over, under, target in setup.compared:
        name = f"{over} / {under}"
        middle, least, greatest = found[name] = ratios(by_name[over].runs, by_name[under].runs)
        sign = "≥" if over in {"PEFT", "mergekit"} else "≤"
        asked = "" if target is None else f"{sign} {target:g}"
        print(f"| {name} | {middle:.2f} | {least:.2f}–{greatest:.2f} | {asked} |")
    shares = [
        run.resident_share_before
        for way in setup.ways
        for run in way.runs
        if run.resident_share_before is not None
    ]
    if shares:
        state = "Dropped from" if setup.cold else "Read into"
        print(f"\n{state} the page cache before each run; {statistics.mean(shares):.0%} was there.")
    return found


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    listed = "\n".join(f"    {case.name:13} {case.about}" for case in CASES.values())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"cases:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=["linear"], metavar="CASE")
    model = parser.add_argument_group("the checkpoint, but for sizes and forms")
    for flag, value in MODEL_OPTIONS.items():
        model.add_argument(flag, type=int, default=value)
    model.add_argument("--untied", action="store_true", help="an output head of its own")
    model.add_argument("--base-dtype", choices=DTYPES, default="bfloat16")
    model.add_argument("--adapter-dtype", choices=DTYPES, default="float32")
    cases = parser.add_argument_group("what a case goes through")
    cases.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256], help="of linear")
    cases.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="of adapters")
    cases.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    cases.add_argument(
        "--form-elements", type=int, default=1 << 29, help="weights of each form (default: 2^29)"
    )
    cases.add_argument(
        "--file-systems", nargs="+", choices=("xfs", "btrfs"), default=["xfs"], help="of reflink"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--rivals", nargs="+", choices=("cp", "peft", "mergekit"), default=["cp"])
    running.add_argument("--repetitions", type=int, default=9)
    running.add_argument("--threads", type=int, default=0, help="of lorafast; 0: its own choice")
    running.add_argument("--directory", type=Path, help="where inputs and outputs are made")
    running.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    for rival in options.rivals:
        if not installed(rival):
            parser.error(f"{rival} is not installed here")
    return options


def main() -> None:
    options = parse()
    result: dict[str, Any] = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "processor": processor(),
        "processors": os.cpu_count(),
        "versions": versions(),
        "setups": [],
    }
    print(
        f"{processor()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f};"
        f" {options.base_dtype} weights, {options.adapter_dtype} adapters;"
        f" {options.repetitions} rounds"
    )
    highest_yet: Ceilings | None = None
    for name in options.case:
        with tempfile.TemporaryDirectory(dir=options.directory, prefix="lorafast-bench-") as made:
            folder = Path(made)
            ceilings, measured_on = None, None
            for setup in CASES[name].setups(options, folder):
                # Of the file system that the setup lies on, which may be its own.
                place = setup.inputs[0].parent
                if ceilings is None or place.stat().st_dev != measured_on:
                    measured_on = place.stat().st_dev
                    ceilings = measure_ceilings(
                        setup.inputs[0], place, disk=setup.cold, copying=setup.copying
                    ).at_least(highest_yet)
                    highest_yet = ceilings
                    print(f"\n## {name}: {CASES[name].about}\n")
                    print("".join(f"- {line}\n" for line in ceilings.lines()), end="")
                said = run_setup(setup, place, options)
                found = show(setup, ceilings)
                print("".join(f"\n{line}.\n" for line in said), end="", flush=True)
                result["setups"].append(
                    {
                        "case": name,
                        "title": setup.title,
                        "ceilings": asdict(ceilings),
                        "targets": [list(entry) for entry in setup.compared],
                        "ratios": found,
                        "said": said,
                        "ways": [
                            {
                                "name": way.name,
                                "bytes": way.size,
                                "operations": way.operations,
                                "runs": [asdict(run) for run in way.runs],
                            }
                            for way in setup.ways
                        ],
                    }
                )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

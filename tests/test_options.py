"""The options of scans, similarity and analysis stand in tables, which signatures and flags keep.

Those of merges have tests of their own in `merge/test_options.py`.
"""

from __future__ import annotations

import argparse
import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._analysis.options import AnalysisOptions, CommonOptions, CompareOptions
from lorafast._cli.main import main
from lorafast._cli.options import chosen
from lorafast._cli.similarity import add_arguments as similarity_arguments
from lorafast._fleet.options import ScanOptions
from lorafast._options import check_choices, options_in, pick
from lorafast._similarity.options import SimilarityOptions, TrajectoryOptions
from support.handmade import make_adapter
from support.options import check_flags, check_signature

#: The table of each function, which is a command as well.
TABLES: dict[str, type[Any]] = {
    "analyze": AnalysisOptions,
    "compare": CompareOptions,
    "duplicates": CommonOptions,
    "lineage": CommonOptions,
    "scan": ScanOptions,
    "similarity": SimilarityOptions,
    "trajectory": TrajectoryOptions,
}
#: What no type of an option allows.
ODD: Any = "odd"
#: Keywords that are no options.
BESIDE = {"compare": {"names"}}


@pytest.mark.parametrize("name", TABLES)
def test_a_signature_has_the_options_of_its_table(name: str) -> None:
    options = options_in(TABLES[name])
    check_signature(getattr(lorafast, name), options, BESIDE.get(name, set()))


@pytest.mark.parametrize("name", TABLES)
def test_a_command_has_a_flag_for_each_option(name: str) -> None:
    module = import_module(f"lorafast._cli.{name}")
    check_flags(module.add_arguments, options_in(TABLES[name]))


@pytest.mark.parametrize("table", dict.fromkeys(TABLES.values()), ids=lambda each: each.__name__)
def test_a_table_is_frozen_and_survives_pickling(table: type[Any]) -> None:
    options = table(threads=2)
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(AttributeError):
        options.threads = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScanOptions(metrics=ODD), "metrics must be one of full, headers, moments, spectra"),
        (SimilarityOptions(metric=ODD), "metric must be one of cosine, inner_product"),
        (SimilarityOptions(precision=ODD), "precision must be one of auto, float64, float32"),
        (TrajectoryOptions(by=ODD), "by must be one of update, name, given"),
    ],
    ids=["metrics", "metric", "precision", "by"],
)
def test_a_value_beside_the_choices_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}, not 'odd'$"):
        check_choices(options)


@pytest.mark.parametrize("table", dict.fromkeys(TABLES.values()), ids=lambda each: each.__name__)
def test_defaults_are_among_the_choices(table: type[Any]) -> None:
    check_choices(table())


def test_arguments_that_are_no_options_are_left_where_they_are() -> None:
    assert pick(CommonOptions, {"paths": "here", "threads": 4}) == CommonOptions(threads=4)


@pytest.mark.parametrize(
    ("words", "memory"),
    [([], 10**9), (["--memory", "2.5"], 2_500_000_000), (["--memory", "1e-12"], 1)],
    ids=str,
)
def test_the_command_takes_memory_in_gigabytes(words: list[str], memory: int) -> None:
    parser = argparse.ArgumentParser()
    similarity_arguments(parser)
    given = chosen(parser.parse_args(["adapters", *words]), options_in(SimilarityOptions))
    assert given["memory"] == memory
    assert type(given["memory"]) is int


def test_a_command_passes_on_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter")
    heard: dict[str, Any] = {}
    scan = lorafast.scan

    def hear(paths: Any, **options: Any) -> Any:
        heard.update(options)
        return scan(paths, **options)

    monkeypatch.setattr(lorafast, "scan", hear)
    words = ["--metrics", "headers", "--threads", "1", "--cache", str(tmp_path / "cache")]
    words += ["--exclude", "old", "--exclude", "tmp/*"]
    assert main(["scan", str(tmp_path / "adapter"), *words, "--quiet"]) == 0
    expected = ScanOptions("headers", ["old", "tmp/*"], str(tmp_path / "cache"), 1)
    assert heard == expected._asdict()

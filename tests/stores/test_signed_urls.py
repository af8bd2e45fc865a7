"""URLs whose query signs them: it goes along with each request, and into nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import lorafast
import pytest
from support.range_server import serving
from support.store_models import Model, files_of

QUERY = "X-Amz-Expires=900&X-Amz-Signature=0123%2Fsecret"


def is_signed(path: str) -> bool:
    return path.partition("?")[2] == QUERY


def test_a_folder_whose_files_are_read_with_one_signature(
    small: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(small.base.parent) as server:
        server.allows = lambda method, path: is_signed(path)
        with pytest.raises(lorafast.StoreError, match=r"refuses it \(403\)"):
            lorafast.inspect(f"{server.url}/base")
        base, adapter = f"{server.url}/base?{QUERY}", f"{server.url}/adapter/?{QUERY}"
        report = lorafast.merge(base, adapter, tmp_path / "out", verify=True)
        assert report.base == f"{server.url}/base"
        assert files_of(tmp_path / "out") == small.merged
        assert lorafast.inspect(base).path == f"{server.url}/base"
        plan = lorafast.plan(base, adapter)
        assert "secret" not in plan.to_json() + repr(plan) + str(report.to_dict())
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes(), path.name
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err


def presigned(name: str) -> Callable[[str, str], bool]:
    """What S3 answers to a URL that is signed for reading one object."""
    return lambda method, path: (
        method == "GET" and is_signed(path) and unquote(path.partition("?")[0]) == f"/{name}"
    )


def test_a_single_file_that_is_signed_for_reading_alone(small: Model, tmp_path: Path) -> None:
    # One file that tells all of itself.
    lorafast.convert(small.adapter, tmp_path / "files" / "style.safetensors", to="kohya")
    shutil.copytree(small.base, tmp_path / "files" / "base")
    with serving(tmp_path / "files") as server:
        name = next(small.base.glob("*00001-of*")).name
        server.allows = presigned(f"base/{name}")
        listing = lorafast.inspect(f"{server.url}/base/{name}?{QUERY}")
        assert listing.path == f"{server.url}/base/{name}"
        server.allows = presigned("style.safetensors")
        adapter = f"{server.url}/style.safetensors?{QUERY}"
        lorafast.merge(small.base, adapter, tmp_path / "out", weights=[0.5])
        assert "secret" not in (tmp_path / "out" / "merge_report.json").read_text()
        assert {each.method for each in server.asked} == {"GET"}
        # One that has expired.
        server.allows = lambda method, path: False
        for read in (
            lambda: lorafast.inspect(f"{server.url}/base/{name}?{QUERY}"),
            lambda: lorafast.merge(small.base, adapter, tmp_path / "late"),
        ):
            with pytest.raises(lorafast.StoreError, match="signature of the URL") as caught:
                read()
            assert "secret" not in str(caught.value)
            assert "secret" not in repr(caught.value.__cause__)

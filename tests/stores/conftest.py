"""A server for all tests of stores of one process, and small models to be merged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from support.fault_proxy import FaultProxy, before
from support.object_stores import Bucket, moto
from support.store_models import Model

_COUNT = itertools.count(1)


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """An S3 server that always runs."""
    with moto() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str) -> Bucket:
    """An empty bucket."""
    return Bucket(endpoint, f"bucket-{next(_COUNT)}")


@pytest.fixture
def proxy(endpoint: str) -> Iterator[FaultProxy]:
    """What breaks the answers of the server."""
    with before(endpoint) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the machine's credentials, or leaves it."""
    import os

    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Three shards of a few kilobytes."""
    return Model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two shards of several windows and parts."""
    return Model(tmp_path_factory.mktemp("large"), large=True)

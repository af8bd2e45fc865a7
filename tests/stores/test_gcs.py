"""Google Cloud Storage, as far as a stub of its requests goes."""

from __future__ import annotations

import lorafast
import pytest
from support.gcs_stub import gcs
from support.store_models import Model, without_reports


# Beside others, a stub of Python's threads can be too slow for the uploads of several threads.
@pytest.mark.alone
def test_a_merge_from_and_to_google(large: Model) -> None:
    with gcs() as stub:
        for path in large.base.iterdir():
            stub.objects[f"models/base/{path.name}"] = path.read_bytes()
        given = {"bearer_token": "a-token"}
        lorafast.merge(
            "gs://models/base",
            large.adapter,
            "gs://models/out",
            storage_options={"google_base_url": stub.url},
            credential_provider=lambda: (given, None),
            verify=True,
        )
        written = {
            name.removeprefix("models/out/"): content
            for name, content in stub.objects.items()
            if name.startswith("models/out/")
        }
        assert without_reports(written) == large.merged
        assert stub.bearers == {"Bearer a-token"}
        assert stub.uploads == {}
        with pytest.raises(lorafast.OutputError, match="holds a model"):
            lorafast.merge(
                large.base,
                large.adapter,
                "gs://models/out",
                storage_options={"google_base_url": stub.url, "google_skip_signature": "true"},
            )

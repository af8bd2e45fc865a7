"""Azure's blob storage, as far as a stub of its requests goes."""

from __future__ import annotations

import base64

import lorafast
import pytest
from support.azure_stub import AzureStub, azure
from support.store_models import Model, without_reports


def told(stub: AzureStub) -> dict[str, str]:
    return {
        "azure_storage_account_name": "account",
        "azure_storage_account_key": base64.b64encode(b"a key of the tests").decode(),
        "azure_storage_endpoint": stub.url,
    }


def written(stub: AzureStub, prefix: str) -> dict[str, bytes]:
    return {
        name.removeprefix(prefix): content
        for name, content in stub.blobs.items()
        if name.startswith(prefix)
    }


# Beside others, a stub of Python's threads can be too slow for the uploads of several threads.
@pytest.mark.alone
def test_a_merge_from_and_to_azure(large: Model) -> None:
    with azure() as stub:
        for path in large.base.iterdir():
            stub.blobs[f"models/base/{path.name}"] = path.read_bytes()
        options = told(stub)
        lorafast.merge(
            "az://models/base",
            large.adapter,
            "az://models/out",
            storage_options=options,
            verify=True,
        )
        assert without_reports(written(stub, "models/out/")) == large.merged
        assert stub.told == {"SharedKey account"}
        assert stub.blocks == {}
        with pytest.raises(lorafast.OutputError, match="holds a model"):
            lorafast.merge(large.base, large.adapter, "az://models/out", storage_options=options)


def test_an_unfinished_merge_on_azure_is_completed_or_removed(small: Model) -> None:
    with azure() as stub:
        options = told(stub)
        names = sorted(path.name for path in small.base.glob("*.safetensors"))
        stub.refused = names[-1]
        with pytest.raises(lorafast.StoreError, match="Storage Blob Data Contributor"):
            lorafast.merge(
                *(small.base, small.adapter, "az://models/out"),
                threads=1,
                storage_options=options,
            )
        stub.refused = None
        assert f"models/out/{names[0]}" in stub.blobs
        assert "models/out/.lorafast/claim" in stub.blobs
        assert "models/out/config.json" not in stub.blobs
        lorafast.merge(small.base, small.adapter, "az://models/out", storage_options=options)
        assert without_reports(written(stub, "models/out/")) == small.merged
        assert not any(".lorafast/" in name for name in stub.blobs)

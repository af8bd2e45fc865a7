"""What merges that did not finish left in an object store: removed."""

from __future__ import annotations

from lorafast._io.stores import is_url, located, using
from lorafast._merge.options import StoreOptions
from lorafast._options import pick
from lorafast._types import CredentialProvider, StorageOptions


def clean(
    output: str,
    *,
    storage_options: StorageOptions | None = None,
    credential_provider: CredentialProvider | None = None,
) -> list[str]:
    """Removes what unfinished merges left at a URL: claim, markers, and shards without a model.

    A finished model stays as it is. Nothing is asked. A directory brings itself to order, see
    `lorafast.recover`.

    Args:
        output: the URL of the output.
        storage_options: as for `lorafast.merge`.
        credential_provider: as for `lorafast.merge`.

    Returns:
        The names of the objects that were removed.

    Raises:
        ValueError: it is no URL of a store.
        StoreError: the store refuses, or cannot be reached.
    """
    arguments = locals()
    if not is_url(output):
        raise ValueError(f"{output}: is no URL of a store; lorafast.recover is for directories")
    with using(pick(StoreOptions, arguments).settings()):
        return list(located(output).clean()["removed"])

"""Optional packages: which extra installs them, and one message for all that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from lorafast._errors import MissingDependencyError

#: The extras of lorafast by what they are for, and the packages that each brings to import. The
#: first one that brings all that is missing is what a message asks for.
EXTRAS: dict[str, frozenset[str]] = {
    "hub": frozenset({"huggingface_hub"}),
    "torch": frozenset({"torch"}),
    "fleet": frozenset({"pyarrow", "plotly", "scipy", "matplotlib"}),
    "notebook": frozenset({"pandas", "scipy", "matplotlib"}),
    "polars": frozenset({"polars"}),
}


def require(needs: Mapping[str, str]) -> None:
    """Makes sure that packages are installed, before any work that takes them.

    Args:
        needs: for each package what it is needed for, to end the sentence "… is needed to". None
            is imported.

    Raises:
        MissingDependencyError: some are not there; the message names all of them, and the one
            command that installs them.
    """
    lacking = {package: purpose for package, purpose in needs.items() if not is_there(package)}
    if not lacking:
        return
    sentences = [f"{package} is needed to {purpose}" for package, purpose in lacking.items()]
    text = ", ".join(sentences[:-1]) + " and " * (len(sentences) > 1) + sentences[-1]
    what = {1: "it", 2: "both"}.get(len(lacking), "all of them")
    extras = ",".join(extras_of(lacking))
    raise MissingDependencyError(f'{text}; install {what} with: pip install "lorafast[{extras}]"')


def is_there(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:
        # It is imported, and says nothing of where from.
        return True


def extras_of(packages: Iterable[str]) -> list[str]:
    """The fewest extras that bring some packages, as far as taking the fullest first finds them."""
    left = set(packages)
    chosen: set[str] = set()
    while left:
        best = max(EXTRAS, key=lambda extra: len(EXTRAS[extra] & left))
        chosen.add(best)
        left -= EXTRAS[best]
    return [extra for extra in EXTRAS if extra in chosen]

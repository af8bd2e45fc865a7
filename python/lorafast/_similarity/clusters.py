"""Hierarchical clustering of adapters, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from lorafast._errors import missing
from lorafast._similarity.similarity import Method

if TYPE_CHECKING:
    from lorafast._analysis.records import Matrix
    from lorafast._similarity.similarity import Similarity


def hierarchy() -> Any:
    """SciPy's module.

    Raises:
        MissingDependencyError: SciPy is not installed.
    """
    try:
        from scipy.cluster import hierarchy
    except ImportError as error:
        raise missing("scipy", "clusters", "cluster adapters") from error
    return hierarchy


def cosines(similarity: Similarity) -> Matrix:
    """The matrix of cosines, whatever the metric."""
    import numpy as np

    if similarity.metric == "cosine":
        return similarity.matrix
    with np.errstate(divide="ignore", invalid="ignore"):
        return similarity.matrix / np.outer(similarity.norms, similarity.norms)


def _check(method: str) -> None:
    known = get_args(Method)
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, not {method!r}")


def tree(matrix: Matrix, positions: Sequence[int], method: str) -> Matrix:
    """The linkage of some adapters that all have cosines with each other."""
    import numpy as np

    _check(method)
    rows, columns = np.triu_indices(len(positions), 1)
    own = matrix[np.ix_(positions, positions)]
    distances = np.maximum(1.0 - own[rows, columns], 0.0)
    result: Matrix = hierarchy().linkage(distances, method=method)
    return result


def linkage(similarity: Similarity, method: str) -> Matrix:
    """See `Similarity.linkage`."""
    import numpy as np

    if len(similarity) < 2:
        raise ValueError("a linkage needs two adapters or more")
    matrix = cosines(similarity)
    if not np.isfinite(matrix).all():
        raise ValueError(
            "some pairs have no cosine (zero or non-finite adapters, or several bases); "
            "clusters() copes with them, split() separates the bases"
        )
    return tree(matrix, range(len(similarity)), method)


def clusters(
    similarity: Similarity, threshold: float, count: int | None, method: str
) -> list[list[str]]:
    """See `Similarity.clusters`."""
    import numpy as np

    _check(method)
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be a cosine from -1 to 1, not {threshold}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    matrix = cosines(similarity)
    found: list[list[int]] = []
    for members in similarity.groups.values():
        known = [at for at in members if np.isfinite(matrix[at, at])]
        found += [[at] for at in members if not np.isfinite(matrix[at, at])]
        if len(known) < 2:
            found += [[at] for at in known]
            continue
        joined = tree(matrix, known, method)
        if count is None:
            labels = hierarchy().fcluster(joined, 1.0 - threshold, criterion="distance")
        else:
            labels = hierarchy().fcluster(joined, count, criterion="maxclust")
        by_label: dict[int, list[int]] = {}
        for at, label in zip(known, labels, strict=True):
            by_label.setdefault(int(label), []).append(at)
        found += by_label.values()
    found.sort(key=lambda cluster: (-len(cluster), cluster[0]))
    return [[similarity.names[at] for at in cluster] for cluster in found]

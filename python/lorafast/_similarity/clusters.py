"""Hierarchical clustering of adapters, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from lorafast._errors import missing
from lorafast._types import Method

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from lorafast._types import Matrix, Metric


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


def cosines(metric: Metric, matrix: Matrix, norms: NDArray[numpy.float64]) -> Matrix:
    """The matrix of cosines, whatever the metric of a similarity's matrix."""
    import numpy as np

    if metric == "cosine":
        return matrix
    with np.errstate(divide="ignore", invalid="ignore"):
        return matrix / np.outer(norms, norms)


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


def linkage(matrix: Matrix, method: str) -> Matrix:
    """`Similarity.linkage` of a matrix of cosines."""
    import numpy as np

    if len(matrix) < 2:
        raise ValueError("a linkage needs two adapters or more")
    if not np.isfinite(matrix).all():
        raise ValueError(
            "some pairs have no cosine (zero or non-finite adapters, or several bases); "
            "clusters() copes with them, split() separates the bases"
        )
    return tree(matrix, range(len(matrix)), method)


def clusters(
    matrix: Matrix,
    groups: Sequence[Sequence[int]],
    threshold: float,
    count: int | None,
    method: str,
) -> list[list[int]]:
    """`Similarity.clusters` of a matrix of cosines, as positions.

    Args:
        matrix: of cosines.
        groups: the positions of each base's adapters.
        threshold: as there.
        count: as there.
        method: as there.
    """
    import numpy as np

    _check(method)
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be a cosine from -1 to 1, not {threshold}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    found: list[list[int]] = []
    for members in groups:
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
    return found

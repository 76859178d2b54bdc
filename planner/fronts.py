"""Which points no other point beats: smaller is better in every column."""

from __future__ import annotations

from typing import Any

import numpy as np

Points = np.ndarray[Any, np.dtype[np.float64]]
FEW = 12  # rows that are all compared with each other at once


def nondominated(points: Points) -> Any:
    """Indices, in order, of the rows that no other row is at most equal to in every column.

    Of equal rows the first is kept.
    """
    count = len(points)
    if count > FEW:  # columns that are alike, as those of phases are, say the same once
        points = points[:, (points != points[0]).any(axis=0)]
        columns = {column.tobytes(): place for place, column in enumerate(np.ascontiguousarray(points.T))}
        points = points[:, sorted(columns.values())]
    if count <= FEW:
        beats = (points[:, None] <= points[None]).all(axis=2)
        first = np.tri(count, k=-1, dtype=bool).T  # of equals the first
        return np.flatnonzero(~(beats & (first | ~beats.T)).any(axis=0))
    # Sums are added in the same order, and rounding keeps order: who beats a row has no larger sum. Of equal sums the
    # columns decide, one after the other, and of equal rows the place.
    left = np.lexsort((*points.T[::-1], points.sum(axis=1)))
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[~(points[best] <= points[left]).all(axis=1)]
    return np.sort(np.array(kept))

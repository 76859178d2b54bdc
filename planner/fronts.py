"""Which points no other point beats: smaller is better in every column."""

from __future__ import annotations

from typing import Any

import numpy as np

Points = np.ndarray[Any, np.dtype[np.float64]]
BLOCK = 256  # rows that are compared with each other at once
STRONG = 4  # rows that all others are held against first


def nondominated(points: Points) -> Any:
    """Indices, in order, of the rows that no other row is at most equal to in every column.

    Of equal rows the first is kept.
    """
    if len(points) > 1:  # columns that are alike, as those of phases are, say the same once
        points = points[:, (points != points[0]).any(axis=0)]
        columns = {column.tobytes(): place for place, column in enumerate(np.ascontiguousarray(points.T))}
        points = points[:, sorted(columns.values())]
    left = _strongly_left(points)
    return left[_front(points[left])]


def _strongly_left(points: Points) -> Any:
    """Indices, in order, of what is left where rows of small sums have beaten what they beat: often nearly nothing."""
    left = np.arange(len(points))
    for best in np.argsort(points.sum(axis=1), kind="stable")[:STRONG]:
        if len(left) <= BLOCK:
            break
        if best in left:
            left = left[(points[best] > points[left]).any(axis=1) | (left == best)]
    return left


def _front(points: Points) -> Any:
    # Sums are added in the same order, and rounding keeps order: who beats a row has no larger sum. Of equal sums the
    # columns decide, one after the other, and of equal rows the place; so who beats a row stands before it.
    order = np.lexsort((*points.T[::-1], points.sum(axis=1)))
    kept = np.zeros(0, dtype=np.int64)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        block = block[~_no_more(points[kept], points[block]).any(axis=0)]
        beaten = np.triu(_no_more(points[block], points[block]), k=1).any(axis=0)
        kept = np.concatenate([kept, block[~beaten]])
    return np.sort(kept)


def _no_more(one: Points, other: Points) -> Any:
    """Whether each row of one is at most equal to each row of the other in every column."""
    found = np.ones((len(one), len(other)), dtype=bool)
    for column in range(one.shape[1]):
        found &= one[:, column, None] <= other[None, :, column]
    return found

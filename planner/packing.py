"""Which documents share a row: the trainer packs by this, and the planner counts rows by it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush


def pack(inputs: Sequence[int], room: int, most: int) -> list[list[int]]:
    """Puts pieces of documents together, the longest first, each where it leaves the least room (best fit decreasing).

    Args:
        inputs: of each piece, in the order of the data.
        room: inputs that pieces may have together; a piece of as many or more stays alone.
        most: pieces in one row at most.

    Returns:
        For each row the places of its pieces, in the order of the data; rows in the order of their first pieces.
    """
    rows: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # for each amount of room that is left the rows that have it, a heap
    rooms: list[int] = []  # these amounts, the smallest first
    for piece in sorted(range(len(inputs)), key=lambda place: (-inputs[place], place)):
        place = bisect_left(rooms, inputs[piece])
        if place == len(rooms) or inputs[piece] >= room:
            row, left = len(rows), room
            rows.append([])
        else:
            left = rooms[place]
            row = heappop(waiting[left])
            if not waiting[left]:
                del waiting[left], rooms[place]
        rows[row].append(piece)
        left -= inputs[piece]
        if left > 0 and len(rows[row]) < most:
            if left not in waiting:
                insort(rooms, left)
            heappush(waiting.setdefault(left, []), row)
    return sorted(sorted(row) for row in rows)

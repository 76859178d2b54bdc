"""What the times of combinations are compared by: sums of columns of seconds, as few as tell which is never slower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.evaluate import Array
from planner.rows import Values
from planner.timecost import AHEAD, EXPOSED, INWARD, LAUNCHED, OF_STAGE, STAGES, TIMED
from planner.weighing import PART

Span = tuple[list[int], list[float]]
"""Columns, and a factor of each: a sum that has a part in the time, which grows with it."""
_STAGES = {
    phase: [[PART[what, phase, stage] for what in OF_STAGE] for of, stage in STAGES if of is phase] for phase in TIMED
}
_INWARD = OF_STAGE.index(INWARD)


@dataclass(frozen=True)
class Spans:
    """Places of several groups, of each of which one is taken.

    Attributes:
        sums: place × column; ``starts``: the first place of each group.
        layers: L.
    """

    sums: Values
    starts: Array
    layers: int

    @cached_property
    def least(self) -> Values:
        """No combination has less of a column."""
        return np.asarray(np.minimum.reduceat(self.sums, self.starts).sum(axis=0))

    @cached_property
    def most(self) -> Values:
        """No combination has more of a column."""
        return np.asarray(np.maximum.reduceat(self.sums, self.starts).sum(axis=0))

    def compared(self) -> list[Span]:
        """Of two combinations of which neither span is larger, the time is not.

        Where one of a stage's columns is never below the others it adds up; and where a phase never waits for the host
        or for what is fetched ahead, its stages do.
        """
        step: dict[int, float] = {}
        others: list[dict[int, float]] = []
        for phase in TIMED:
            exposed, ahead, launched = (PART[what, phase, ""] for what in (EXPOSED, AHEAD, LAUNCHED))
            own, late = {exposed: 1.0}, {ahead: 1.0 / self.layers}
            inward, surely, apart = {ahead: 1.0}, {exposed: 1.0}, list[dict[int, float]]()
            high = float(self.most[exposed])
            for columns in _STAGES[phase]:
                tops = self._never_below(columns)
                high += float(self.most[tops].max())
                inward[columns[_INWARD]] = surely[tops[0]] = 1.0
                if len(tops) == 1:
                    own[tops[0]] = 1.0
                else:
                    apart += [{column: 1.0} for column in tops]
            copied = bool(self.most[ahead] > 0) and self._above(inward, surely)
            if max(high, sum(float(self.most[column]) for column in inward)) <= self.least[launched]:
                step |= {launched: 1.0} | late
            elif copied or self._above({launched: 1.0}, surely):
                others += [own, late, *([inward] if copied else []), {launched: 1.0}, *apart]
            else:
                step |= own | late
                others += apart
        differ = self.most > self.least
        kept = [{column: factor for column, factor in part.items() if differ[column]} for part in (step, *others)]
        return [([*part], [*part.values()]) for part in kept if part]

    def _above(self, one: Mapping[int, float], other: Mapping[int, float]) -> bool:
        """Whether one sum of columns may be above another, whatever is chosen."""
        more = np.zeros(len(self.sums))
        for part, sign in ((one, 1.0), (other, -1.0)):
            for column, factor in part.items():
                more += sign * factor * self.sums[:, column]
        return bool(np.maximum.reduceat(more, self.starts).sum() > 0)

    def _never_below(self, columns: Sequence[int]) -> list[int]:
        """Of some columns those that may be the highest."""
        kept = sorted(columns, key=lambda column: -float(self.most[column]))
        for column in reversed(kept[1:]):
            if any(other != column and not self._above({column: 1.0}, {other: 1.0}) for other in kept):
                kept.remove(column)
        return kept

"""The longest sequence that anything can train: some settings that fit, as long as they can be, and on from there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.compose import Configuration
from planner.evaluate import Array, Candidates, Evaluator, Limits
from planner.fields import Sum
from planner.on_card import SpaceOnCard
from planner.space import Space
from planner.weighing import share

COARSEST, FINEST = 64, 64  # tokens: the least sequence that is looked at, and the step of the longest
LONGEST = 2**24  # tokens; nothing longer is looked at


def longest(
    on_card: SpaceOnCard, limits: Limits, *, rank: int, target: int | None, batch: int = 1, least: int = COARSEST
) -> int | None:
    """The longest sequence any configuration can train; None where not even ``least`` tokens fit.

    Memory of each configuration grows with the sequence. So from one that fits its own longest sequence is found, and
    one step beyond it another that fits, until there is none. Time grows likewise, save where a chunk more begins and
    its copies hide behind the one before; so where time alone is too long, one step into the next chunks is tried too.
    Approximate: it may fall anywhere else, and which of several last lengths is found hangs on those that are tried.

    Args:
        target: trained tokens, or None where every token is trained.
    """
    most = on_card.space.situation.model.most_tokens or LONGEST
    best, total = None, min(max(least, COARSEST), most)
    while True:
        at = runs(np.array([total]), rank, target, batch)
        if not on_card.has_room(at, 0, limits):
            return best
        roomiest = on_card.at(at, 0).having(None).cheapest(limits, (share(limits),))
        if roomiest is None:
            further = _into_the_next_chunks(on_card, limits, at)
            if further is None:
                return best
            total = further
            continue
        best = _Lengths(on_card, roomiest, limits, rank, target, batch).last_between(total, most)
        if best >= most:
            return best
        total = min(_step_after(best), most)


def _into_the_next_chunks(on_card: SpaceOnCard, limits: Limits, at: Candidates) -> int | None:
    """One step into the next chunk of any size after a length at which time alone is too long, if that fits."""
    endless = replace(limits, step_seconds=float("inf"))
    if on_card.at(at, 0).having(None).cheapest(endless, (share(limits),), first=True) is None:
        return None
    total, most = int(at.total[0]), on_card.space.situation.model.most_tokens or LONGEST
    # The last whole number of chunks that is no longer than ``total`` less a step, a chunk on, and a step beyond it.
    begins = {((total - FINEST) // chunk + 1) * chunk + FINEST for chunk in _chunks(on_card.space)}
    lengths = np.array(sorted(length for length in begins if length <= most), dtype=np.int64)
    targets = np.minimum(lengths, at.target[0]) if at.target[0] < total else lengths
    following = Candidates(lengths, targets, np.full_like(lengths, at.rank[0]), at.batch)
    return next((int(each) for i, each in enumerate(lengths) if on_card.fits(following, i, limits, None)), None)


def _chunks(space: Space) -> set[int]:
    """Every size that a chunk may have where layers run in passes."""
    options = (option for branch in space.branches for group in branch.groups for option in group)
    dials = {dial for option in options for dial in option.dials if dial.letter == "S_c"}
    fixed = {branch.trunk.letters["S_c"] for branch in space.branches}
    return {size for size in fixed.union(*(dial.values for dial in dials)) if size < LONGEST}


def runs(totals: Array, rank: int, target: int | None, batch: int) -> Candidates:
    """Runs of these lengths; ``target`` is None where every token is trained."""
    targets = totals if target is None else np.minimum(totals, target)
    return Candidates(totals, targets, np.full_like(totals, rank), batch)


def grid_between(low: int, high: int, count: int = 65) -> Array:
    """At most so many lengths from one to the other, in steps of ``FINEST`` or of equal shares."""
    steps = np.geomspace(low, high, count).astype(np.int64) // FINEST * FINEST
    return np.array(sorted({int(total) for total in steps if total >= COARSEST} | {low}))


def _step_after(total: int) -> int:
    return total // FINEST * FINEST + FINEST


class _Lengths:
    """One configuration at one length after another."""

    def __init__(
        self, on_card: SpaceOnCard, one: Sum, limits: Limits, rank: int, target: int | None, batch: int
    ) -> None:
        self.configuration: Configuration = on_card.space.configuration(one.branch, one.places)
        # Cards of one kind share their space.
        self.situation = replace(on_card.space.situation, gpu=on_card.scale.gpu)
        self.constants, self.limits = on_card.scale.constants, limits
        self.run = (rank, target, batch)
        self.before: Evaluator | None = None

    def taken(self, total: int) -> float:
        """The largest share of a limit that is taken; what fits takes no more than 1, and what does not takes more."""
        at = runs(np.array([total]), *self.run)
        self.before = Evaluator(at, self.situation, self.constants, self.limits, like=self.before)
        found, limits = self.before(self.configuration), self.limits
        shares = [
            int(found.high[0]) / max(1, limits.gpu_bytes),
            int(found.host[0]) / max(1, limits.host_bytes),
            int(found.disk[0]) / max(1, limits.disk_bytes),
        ]
        # Where bytes alone are too many, that is said without the time, which takes as long to compute as they do.
        if max(shares) <= 1 and limits.step_seconds < float("inf") and found.time.estimate is not None:
            shares.append(float(found.time.estimate[0]) / limits.step_seconds)
        return min(max(shares), 1.0) if found.fits[0] else max(*shares, np.nextafter(1.0, 2.0))

    def last_between(self, low: int, high: int) -> int:
        """The last length that fits, of one that does and those in steps of ``FINEST`` beyond it.

        What is looked at next is where the line through both ends of what is left passes 1: memory grows nearly so.
        An end that stays where it is counts half as much from then on (the Illinois method), and after a step that did
        not halve what is left comes the middle, as factors go.
        """
        top = high // FINEST * FINEST
        if top <= low:
            return low
        below, above = self.taken(low) - 1.0, self.taken(top) - 1.0
        if above <= 0:
            return top
        stayed, halve = 0, False
        while (first := _step_after(low)) < top:
            left = top - low
            guess = int(np.sqrt(float(low) * top)) if halve else low + int(left * (-below / (above - below)))
            guess = min(max(guess // FINEST * FINEST, first), top - FINEST)
            found = self.taken(guess) - 1.0
            if found <= 0:
                low, below, above = guess, found, above / 2 if stayed > 0 else above
                stayed = 1
            else:
                top, above, below = guess, found, below / 2 if stayed < 0 else below
                stayed = -1
            halve = not halve and (top - low) * 2 > left
        return low

"""Complete search: every valid set of optimisations at every candidate, none left out that could be the best.

``planner.branches`` says which sets there are, ``planner.space`` evaluates them, leaving out only what another beats
in every respect; so the search needs no heuristic, and can say of every loser why it lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Literal

import numpy as np

from planner.branches import branches
from planner.calibration import Calibration
from planner.compose import compose, problems
from planner.errors import PlanError, raise_all
from planner.evaluate import Candidates, Evaluator, Limits, Outcome
from planner.fields import Sum
from planner.ledger import Device, Phase
from planner.longest import COARSEST, FINEST, longest, runs
from planner.on_card import Level, SpaceOnCard, Wish
from planner.optimizations import all_optimizations
from planner.optimizations.base import Scalar, Situation
from planner.sets import PinnedKnobs, last_resorts
from planner.space import Space
from planner.weighing import CARD_MEMORY, INEXACT_COUNT, SECONDS, TIME, Key, Measure, Weights, beyond, share

Objective = Literal["context", "speed", "memory"]
LongestBy = dict[str, int | None]  # the longest sequence, by what else is searched for it
ENDLESS_LIMITS = Limits(2**62, 2**62, float("inf"), disk_bytes=2**62)


def space_of(
    situation: Situation, required: Sequence[str] = (), excluded: Sequence[str] = (), knobs: PinnedKnobs | None = None
) -> Space:
    """Everything there is to choose from; cards of one kind have the same (``Situation``).

    Raises:
        PlanError: no valid set holds what is required and lacks what is excluded.
    """
    found = branches(situation, required, excluded, knobs or {})
    if not found:
        asked = " ".join([*(f"--with {name}" for name in required), *(f"--without {name}" for name in excluded)])
        why = _why_no_set(situation, required, excluded)
        raise PlanError(asked or "a plan", why, "`plan optimizations` says what each needs.")
    return Space(found, situation, knobs)


@dataclass(frozen=True)
class Resort:
    """A last resort: where a set lacks no more than what ``name`` can save, sets with it are searched too.

    Attributes:
        relieves: the optimisation that it makes room for.
        on_card: the sets with it; made where it is needed.
    """

    name: str
    relieves: str
    on_card: Callable[[], SpaceOnCard]


def resorts_of(
    situation: Situation,
    required: Sequence[str],
    excluded: Sequence[str],
    on_card: Callable[[tuple[str, ...]], SpaceOnCard],
) -> tuple[Resort, ...]:
    """The last resorts that may be taken here; ``on_card`` gives the sets that hold what is required.

    They save memory of the card alone: where it is not lacking, they are not looked at (``Search.may_help``).
    """
    known = all_optimizations()
    return tuple(
        Resort(name, known[name].last_resort, cache(partial(on_card, (*required, name))))
        for name in last_resorts(situation, required, excluded)
    )


# Where two are alike in all that is asked for, the one that takes less time after all.
FASTEST: Key = (TIME, INEXACT_COUNT, CARD_MEMORY, SECONDS)
LEANEST: Key = (CARD_MEMORY, TIME, INEXACT_COUNT, SECONDS)
KEYS: Mapping[Objective, Key] = {"context": FASTEST, "speed": FASTEST, "memory": LEANEST}
# What a knob may not cost if a value that is named earlier is to be taken.
KNOBS: Mapping[Objective, Key] = {"context": FASTEST[:2], "speed": FASTEST[:2], "memory": LEANEST[:3]}


@dataclass(frozen=True)
class Wanted:
    """One length that a plan is wanted for; ``tier`` is None where it is no tier."""

    tier: int | None
    total: int
    target: int
    rank: int


@dataclass(frozen=True)
class Best:
    """What is best of some sets at one length: bytes on the card and in the host, seconds of a step as it is ranked."""

    ids: tuple[str, ...]
    high: int
    host: int
    seconds: float


@dataclass(frozen=True)
class Search:
    """What a search found: the one chosen, and of every other why it was not.

    ``best`` at ``index`` fits, unless nothing fits at any wanted length; then it is what comes nearest there.
    ``resorts``: last resorts that could be looked at; ``first``: the search without one, where it took one.
    ``taken``: an outcome that is told of instead of searching for the best.
    """

    wanted: tuple[Wanted, ...]
    candidates: Candidates
    on_card: SpaceOnCard
    index: int
    situation: Situation
    constants: Calibration
    limits: Limits
    objective: Objective
    resorts: tuple[Resort, ...] = ()
    first: Search | None = None
    taken: Outcome | None = None

    @cached_property
    def best(self) -> Outcome:
        """The one chosen, at all wanted lengths."""
        return self.best_at(self.index) if self.taken is None else self.taken

    @property
    def space(self) -> Space:
        """Everything there was to choose from."""
        return self.on_card.space

    @cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Every valid set with every value of its knobs, at each wanted length; their number doubles with each leaf."""
        evaluate = Evaluator(self.candidates, self.situation, self.constants, self.limits)
        return tuple(evaluate(configuration) for configuration in self.space.configurations())

    def best_at(self, index: int) -> Outcome:
        """What would be chosen at one wanted length: the best that fits, or what comes nearest."""
        return chosen(self.on_card, self.candidates, index, self.objective, self.situation, self.limits)

    @cached_property
    def longest_with_target(self) -> int | None:
        """The longest sequence with as many trained tokens as wanted."""
        want = self.wanted[self.index]
        # Where all tokens are trained, so many are; that is a shorter bracket.
        return _longest_of(self._longest(want, want.target, self._all_trained))

    @property
    def longest_all_trained(self) -> int | None:
        """The longest sequence with every token trained."""
        return _longest_of(self._all_trained)

    @cached_property
    def _all_trained(self) -> LongestBy:
        return self._longest(self.wanted[self.index], None)

    def longest_for(self, want: Wanted, target: int | None) -> int | None:
        """The longest sequence at a rank; ``want`` is where the search begins.

        Args:
            target: trained tokens, or None where every token is trained.
        """
        return _longest_of(self._longest(want, target))

    def _longest(self, want: Wanted, target: int | None, least: LongestBy | None = None) -> LongestBy:
        """The longest sequence without a last resort, by no name, and with each by its own.

        Args:
            least: lengths that are known to fit.
        """
        batch, least = self.candidates.batch, least or {}
        find = partial(longest, limits=self.limits, rank=want.rank, target=target, batch=batch)
        # What is wanted and fits is a shorter bracket; only where that finds nothing all lengths are looked at.
        begin = max(want.total, least.get("") or 0)
        first = find(self.on_card, least=begin) or find(self.on_card)
        found = {"": first}
        beyond = runs(np.array([(first or 0) + FINEST]), want.rank, target, batch)
        for resort in self.resorts:
            if self.may_help(resort, beyond, 0):
                begin = max(first or COARSEST, least.get(resort.name) or 0)
                found[resort.name] = find(resort.on_card(), least=begin)
        return found

    def may_help(self, resort: Resort, candidates: Candidates, index: int) -> bool:
        """Whether what a last resort makes room for would fit if all that this can save were nothing."""
        without = self.space.saved_by(resort.name)
        if not self.on_card.has_room(candidates, index, self.limits, without):
            return False
        level = self.on_card.at(candidates, index, without).having((resort.relieves, True))
        return level.cheapest(self.limits, (share(self.limits),), first=True) is not None

    def least(self, *of: Measure, limits: Limits = ENDLESS_LIMITS, wish: Wish | None = None) -> Weights | None:
        """What takes least of something at the chosen length within limits; None where nothing is within them.

        Args:
            of: of what, and then of what.
            wish: only sets with an optimisation, or only those without.
        """
        found = self.on_card.at(self.candidates, self.index).having(wish).cheapest(limits, of)
        return None if found is None else found.weights

    def exists(self, name: str, on: bool) -> bool:
        """Whether there is any valid set with an optimisation, or without."""
        return self.on_card.stack((name, on)) is not None

    def best_among(self, objective: Objective, name: str, on: bool) -> Best | None:
        """The best with an optimisation, or without, that fits the wanted length; None where there is none."""
        level = self.on_card.at(self.candidates, self.index)
        found = level.having((name, on)).cheapest(self.limits, KEYS[objective][:3])  # what it is told by
        if found is None:
            return None
        weights = found.weights
        return Best(
            self.space.ids(found.branch, found.places), int(weights.high), int(weights.host), float(weights.seconds)
        )

    def reached(self, name: str, on: bool) -> int | None:
        """The last wanted length below the chosen one that fits with an optimisation, or without."""
        return self.on_card.last_fitting(self.candidates, self.limits, wish=(name, on), below=self.index)

    def phases(self, devices: Sequence[Device]) -> dict[Phase, dict[str, int]]:
        """Bytes of the chosen configuration: each term alive in each phase on the devices, none that is empty."""
        want = self.wanted[self.index]
        total, target, rank = (np.array([size]) for size in (want.total, want.target, want.rank))
        one = Candidates(total, target, rank, self.candidates.batch)
        letters = Evaluator(one, self.situation, self.constants, self.limits).letters(self.best.configuration)
        by_phase = self.best.configuration.ledger.by_phase(letters, devices)
        return {
            phase: {name: int(np.ravel(size)[0]) for name, size in terms.items() if np.any(size)}
            for phase, terms in by_phase.items()
        }

    def without(self, name: str) -> Outcome | None:
        """The chosen configuration with one optimisation taken out; None where that is no valid set."""
        ids = [other for other in self.best.ids if other != name]
        if not ids or problems(ids, self.situation):
            return None
        configuration = compose(ids, self.best.configuration.knobs, self.situation)
        return Evaluator(self.candidates, self.situation, self.constants, self.limits)(configuration)


def search(
    situation: Situation,
    limits: Limits,
    constants: Calibration,
    wanted: Sequence[Wanted],
    *,
    objective: Objective,
    required: Sequence[str] = (),
    excluded: Sequence[str] = (),
    knobs: Mapping[str, Mapping[str, Scalar]] | None = None,
    batch: int = 1,
    on_card: SpaceOnCard | None = None,
    resorts: Sequence[Resort] = (),
) -> Search:
    """Search every valid set at every wanted length; the last length that fits wins.

    Args:
        on_card: what there is to choose from, where that is known already.
        resorts: what else is looked at where nothing but what it saves keeps a longer one of the lengths from fitting.

    Raises:
        PlanError: no valid set holds what is required and lacks what is excluded.
    """
    candidates = candidates_of(wanted, batch)
    if on_card is None:
        space = space_of(situation, required, excluded, knobs)
        raise_all(never_used(knobs or {}, space.names, situation))
        on_card = SpaceOnCard(space, situation.gpu, constants, limits.accumulation)
    last = on_card.last_fitting(candidates, limits)
    at, following = (0, 0) if last is None else (last, last + 1)
    found = Search(tuple(wanted), candidates, on_card, at, situation, constants, limits, objective, tuple(resorts))
    for resort in resorts:
        if following < len(wanted) and found.may_help(resort, candidates, following):
            last = resort.on_card().last_fitting(candidates, limits)
            if last is not None and last >= following:
                return replace(found, on_card=resort.on_card(), index=last, resorts=(), first=found)
    return found


def _longest_of(found: LongestBy) -> int | None:
    return max((length or 0 for length in found.values()), default=0) or None


def candidates_of(wanted: Sequence[Wanted], batch: int) -> Candidates:
    """All wanted lengths together."""
    columns = zip(*((want.total, want.target, want.rank) for want in wanted), strict=True)
    total, target, rank = (np.array(column) for column in columns)
    return Candidates(total, target, rank, batch)


def chosen(
    on_card: SpaceOnCard, candidates: Candidates, index: int, objective: Objective, situation: Situation, limits: Limits
) -> Outcome:
    """The best of what fits, or where nothing does what comes nearest."""
    level = on_card.at(candidates, index)
    found = level.having(None).cheapest(limits, KEYS[objective])
    if found is not None and objective == "context":
        found = _gentler(on_card, level, limits, found)
    if found is None:
        found = level.having(None).cheapest(ENDLESS_LIMITS, (share(limits), *beyond(limits), *KEYS[objective]))
        assert found is not None
        places = found.places
    else:
        places = level.with_first_knobs(limits, KNOBS[objective], found)
    configuration = on_card.space.configuration(found.branch, places)
    return Evaluator(candidates, situation, on_card.scale.constants, limits)(configuration)


def _gentler(on_card: SpaceOnCard, level: Level, limits: Limits, found: Sum) -> Sum:
    """The same without what takes more of what is learnt than it gives in time, where that fits and may be left out."""
    known = all_optimizations()
    for name in on_card.space.ids(found.branch, found.places):
        if known[name].worth > 1 and found.weights.known and on_card.stack((name, False)) is not None:
            other = level.having((name, False)).cheapest(limits, KEYS["context"])
            if other is not None and TIME.of(other.weights) <= known[name].worth * TIME.of(found.weights):
                found = other
    return found


def _why_no_set(situation: Situation, required: Sequence[str], excluded: Sequence[str]) -> str:
    """Why nothing is left to choose from: nothing trains, or what is required lacks something."""
    known = all_optimizations()
    trainers = [name for name, each in known.items() if "adapters/weights" in each.makes]
    able = [name for name in trainers if name not in excluded]
    if not able:
        return f"nothing would be trained: {' or '.join(trainers)} makes the adapters."
    if unable := [reason for name in able for reason in known[name].reasons(situation)]:
        return f"nothing can be trained: {'; '.join(unable)}."
    lacking = problems({*required, able[0]}, situation)
    told = [f"{name}: {reason}" for name, reasons in lacking.items() for reason in reasons]
    if told:
        return f"no valid set of optimisations is left. {'; '.join(told)}."
    return "no valid set of optimisations is left that has the knobs as they were set."


def never_used(
    knobs: Mapping[str, Mapping[str, Scalar]], used: frozenset[str], situation: Situation
) -> list[PlanError]:
    """Knobs set of an optimisation that no set holds with them; none of one that cannot be used here at all."""
    known = all_optimizations()
    lost = [(owner, values) for owner, values in knobs.items() if owner not in used]
    return [
        PlanError(
            " ".join(f"--set {owner}.{name}={value}" for name, value in values.items()),
            f"no set of optimisations that is left has {owner} with it.",
            f"It is off unless --with {owner} asks for it."
            if known[owner].asked or known[owner].last_resort
            else f"`plan explain {owner}` says what it needs.",
        )
        for owner, values in lost
        if not known[owner].reasons(situation)
    ]

"""What the claims document says of its numbered items, and what stands for each of them here.

An item is an optimisation that a plan switches on or off (`planner.optimizations.base`), or one that no plan chooses:
what every run does, what a model has or has not, what one card has no use for, what is nothing but a figure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from planner.optimizations.base import Evidence, Situation

NUMBERED = 44
"""So many items the claims document numbers."""
Verdict = Literal["holds", "in part", "does not hold", "not shown"]
NOT_CLAIMED = "not claimed"
State = Literal["always", "never"]
"""Of an item that no plan chooses: in every run, or in none as there is nothing to switch on."""
GIVEN: dict[str, type[Given]] = {}


@dataclass(frozen=True)
class Claimed:
    """What is claimed of one numbered item, and what is so.

    Attributes:
        number: of the item, 1 to 44.
        words: what is claimed, figures as they are written there.
        verdict: ``not shown`` where nothing here decides it.
        true: what is so, in a sentence. Its figures are those of the item's rows in ``reports/claims.md``.
    """

    number: int
    words: str
    verdict: Verdict
    true: str


class Item(ABC):
    """What stands for some of the numbered items, or for none.

    Class attributes:
        id: its name on the command line.
        title: a few words for people.
        claimed: what is claimed of the items it realises.
        numbers: their numbers.
        evidence: what its statements rest on.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    claimed: ClassVar[tuple[Claimed, ...]] = ()
    numbers: ClassVar[tuple[int, ...]] = ()
    evidence: ClassVar[tuple[Evidence, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.numbers = tuple(one.number for one in cls.claimed)

    @property
    def verdict(self) -> str:
        """That on the claim; of several claims with different ones, each with its number."""
        told: dict[int, str] = {one.number: one.verdict for one in self.claimed}
        return self._each(told) if len({*told.values()}) > 1 else next(iter(told.values()), NOT_CLAIMED)

    @property
    def words(self) -> str:
        """What is claimed; of several items, each with its number."""
        return self._each({one.number: one.words for one in self.claimed})

    @property
    def true(self) -> str:
        """What is so; of several items, each with its number, unless it is the same for all."""
        told = {one.number: one.true for one in self.claimed}
        return self._each(told) if len({*told.values()}) > 1 else next(iter(told.values()), "")

    @staticmethod
    def _each(told: Mapping[int, str]) -> str:
        if len(told) < 2:
            return "".join(told.values())
        return "; ".join(f"{number}: {text}" for number, text in told.items())


class Given(Item):
    """An item that no plan chooses. A concrete subclass registers itself by its ``id``.

    Class attributes:
        again: id of the optimisation of which it is the saving, counted once more.
    """

    again: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "id"):
            return  # a kind of item, and none itself
        known = GIVEN.get(cls.id)
        assert known is None or known.__module__ == cls.__module__, f"{cls.id} is defined twice"
        assert cls.__doc__ and cls.evidence and cls.claimed, f"{cls.id}: say what it is, what is claimed, and why"
        GIVEN[cls.id] = cls

    @abstractmethod
    def state(self, situation: Situation) -> tuple[State, str]:
        """Whether each run on this card with this model has it, and why."""

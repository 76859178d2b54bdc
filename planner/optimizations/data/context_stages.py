"""Begin with short rows and double them from stage to stage, as many tokens in each: a curriculum of context.

Every step has the rows that it would have without, and a stage cuts each of them: ``stages`` - 1 times in half in the
first stage, not at all in the last one. What a row trains stays the same, token for token; the first stages show less
of what came before. So steps, epochs and the schedule of the learning rate are those of the run without stages, and
only a row's attention is shorter. Where the end of a row alone is trained, that end is what is cut, and what lies
before it is not read.

A micro-batch of a stage has as many tokens as one of the last, so it saves the time of attention, and no memory. Each
stage is planned at its own length (``stages`` of the plan), the memory of a plan is that of the stage which takes most,
and each is probed before training. Short rows take no less time where there is little attention to save, and more where
layers run in passes by rows, each of which then is short.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class ContextStages(Optimization):
    """Rows that double from stage to stage."""

    id = "context_stages"
    title = "rows that grow from stage to stage"
    claimed = (
        Claimed(
            18,
            "5–10 % faster convergence",
            "does not hold",
            "In the trainings of reports/optimizations.md what is learnt after as many steps is worse with two of "
            "three seeds, by little.",
        ),
        Claimed(
            44,
            "40 % faster",
            "not shown",
            "As many tokens in each stage are estimated to take 59 % less time than all at the longest; whether "
            "as much is learned is not shown.",
        ),
    )
    asked = True
    claims = frozenset({"setting rows"})
    requires = (Needs("adapters/weights", "it is for training"),)
    knobs = (Knob("stages", "stages, each twice as long as the one before", lambda _: (3,), low=2, high=7),)
    evidence = (
        Evidence("short sequences first, in pre-training", "Li et al. 2021, arXiv 2108.06084"),
        Evidence("the same targets in every stage, and what each takes", "tests/test_context_stages.py"),
    )
    exact = False
    instead = "Each stage has the formulas of a run with rows of its length, and as many times the rows."
    effect = "the first stages train the same tokens with less context before them"

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It says what rows are."""
        return {"rows": self.id}

    def apply(self, session: Session) -> None:
        """Cut rows by stages."""
        session.grow_rows(stages=int(session.knob("stages")))

"""Write the adapters down at each evaluation, and keep the newest and the best of them.

They lie in ``checkpoints/step-N`` of the run's folder, each a folder that PEFT loads. ``count`` newest ones are kept,
and the one with the least held-out loss; with ``disk``, fewer where they would take more than so many GiB, and the best
in any case. One more is there while it is written. Evaluations come every ``train.evaluate_every`` steps, ten times in
a run where that is 0. What a run needs to go on after a stop (``train.save_minutes``) is one state, stored over the
last one, whatever is kept here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from planner.ledger import Device, Ledger, Phase, Term
from planner.optimizations.adapters.lora import adapter_parameters, float32
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number, ceil_div, greatest, least
from planner.units import GIB


@cache
def kept_parameters(count: int, disk: int) -> Callable[[Letters], Number]:
    """The newest, the best, and one that is being written; with so many bytes of disk, as many as these hold."""
    if not disk:
        return lambda x: (count + 2) * adapter_parameters(x)

    def within(x: Letters) -> Number:
        one = adapter_parameters(x)
        return least(count + 2, greatest(2, ceil_div(disk + 1, 4 * one))) * one

    return within


class KeptCheckpoints(Optimization):
    """Adapters of several moments of a run, the best among them."""

    id = "kept_checkpoints"
    title = "adapters of several moments on disk, pruned by count, best and bytes"
    claimed = (
        Claimed(
            16,
            "70 % of disk space",
            "in part",
            "Keeping 3 of 10 saves 70 %, by arithmetic; it is disk alone, and adapters are small.",
        ),
    )
    asked = True
    makes = frozenset({"adapters/kept"})
    requires = (Needs("adapters/weights", "it is the adapters that are kept"),)
    knobs = (
        Knob("count", "newest ones that are kept, beside the best", lambda _: (3,), low=1, high=1000),
        Knob("disk", "GiB that all may take, 0 for any", lambda _: (0.0,), low=0.0, high=1e6, whole=False),
    )
    evidence = (
        Evidence("which are kept, and how many bytes", "tests/test_trainer_judging.py"),
        Evidence("one file of adapters is as large as they are", "docs/validation.md"),
    )
    effect = "what is trained is the same; more of it stays on disk"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """So many sets of adapters on disk."""
        return ledger.with_terms(
            Term(
                "adapters/kept",
                kept_parameters(int(knobs["count"]), int(float(knobs["disk"]) * GIB)),
                float32,
                frozenset({Phase.SAVE}),
                "adapters of several moments",
                "trainer/judging.py",
                device=Device.DISK,
            )
        )

    def apply(self, session: Session) -> None:
        """Keep them."""
        session.keep_checkpoints(count=int(session.knob("count")), disk_bytes=int(float(session.knob("disk")) * GIB))

"""Go back some steps where the loss spikes, and on with the batch after the spike.

A loss that is ``sigmas`` standard deviations above the mean of the last ``window`` ones is a spike, and so is one that
is no number, unless a loss scale is looked for. Its step is not taken: adapters, moments, averages and loss scale go
back to a copy in host memory, made every ``every`` steps once the next loss had shown the state to be good, and the
batches since are not trained on. The learning rate goes on by the number of the step. More than ``most`` spikes end the
run, as then it is no batch's fault.

Approximate: the copies, one in ``every`` steps, are left out of the time.
"""

from __future__ import annotations

from planner.ledger import ALWAYS, Basis, Device, Ledger, Phase, Term
from planner.optimizations.adapters.lora import adapter_parameters, step_counters
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.optimizations.optimizer.adamw_8bit import eight, moments
from planner.session import Session
from planner.symbols import Letters, Number


def _full_moments(x: Letters) -> Number:
    return 12 * adapter_parameters(x) + 4 * step_counters(x)


def _eight_bit_moments(x: Letters) -> Number:
    """The scales of two moments beside them; the tables of their codes are never changed, and not copied."""
    return 4 * adapter_parameters(x) + moments(x) + 8 * x.L * x.M_b


def _with_averages(x: Letters) -> Number:
    return _full_moments(x) + 4 * adapter_parameters(x)


def _eight_bit_moments_with_averages(x: Letters) -> Number:
    return _eight_bit_moments(x) + 4 * adapter_parameters(x)


class SpikeRewind(Optimization):
    """A state from before a spike is kept, and gone back to."""

    id = "spike_rewind"
    title = "a loss spike is gone back from, and its batch left out"
    claimed = (
        Claimed(
            17,
            "prevents training divergence",
            "not shown",
            "It takes back what one batch has done and leaves that out; a rate that is too high diverges all the same, "
            "and ends the run with a sentence.",
        ),
    )
    asked = True
    makes = frozenset({"adapters/rewind"})
    requires = (Needs("adapters/weights", "it is the adapters that go back"),)
    knobs = (
        Knob("sigmas", "standard deviations that make a spike", lambda _: (6.0,), low=1.0, high=100.0, whole=False),
        Knob("window", "losses that a new one is compared with", lambda _: (100,), low=2, high=100_000),
        Knob("every", "steps between two copies", lambda _: (10,), low=1, high=100_000),
        Knob("most", "spikes in a run that are borne", lambda _: (20,), low=1, high=100_000),
    )
    evidence = (
        Evidence(
            "going on from before a spike without its batches, which then does not come back",
            "Chowdhery et al. 2022, arXiv 2204.02311",
        ),
        Evidence("what goes back is bit for bit what was there", "tests/test_trainer_spikes.py"),
    )
    exact = False
    effect = "steps with a loss far above the others are taken back"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """A copy of all that a step changes."""
        averaged = "weight_averaging" in situation.chosen or "lookahead" in situation.chosen
        if "adamw_8bit" in situation.chosen:
            size = _eight_bit_moments_with_averages if averaged else _eight_bit_moments
        else:
            size = _with_averages if averaged else _full_moments
        return ledger.with_terms(
            Term(
                "adapters/rewind",
                size,
                eight,
                ALWAYS - {Phase.LOAD},
                "adapters, moments and averages of some steps ago",
                "trainer/spikes.py",
                device=Device.HOST,
                basis=Basis.EXACT,
            )
        )

    def apply(self, session: Session) -> None:
        """Look for spikes."""
        session.go_back_at_spikes(
            sigmas=float(session.knob("sigmas")),
            window=int(session.knob("window")),
            every=int(session.knob("every")),
            most=int(session.knob("most")),
        )

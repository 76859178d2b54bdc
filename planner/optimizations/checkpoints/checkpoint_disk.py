"""Keep layer inputs on disk, and in the host's memory only the two that are worked on.

With streamed layers the kept inputs are what fills the host's memory. A disk has room for them, and time: while a layer
of a long sequence computes, the next input comes and the last one goes. Each is written once in a step and
read once, so the bytes that the disk takes in are those of all inputs in every step, which is what an SSD wears by.
"""

from __future__ import annotations

from planner.baseline_formulas import one_byte
from planner.ledger import ALWAYS, Device, Ledger, Phase, Resource, Term, Work
from planner.optimizations.base import Evidence, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.streamed_disk import disk_traffic, held_inputs, stored_inputs

SOURCE = "trainer/streamed/shelf.py"


class _DiskAllowed:
    """Needs leave to use a disk."""

    text = "leave to use a disk: --disk 200GiB, say"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Empty where any of it may be used."""
        return () if situation.disk_bytes else ("uses a disk only with leave: --disk 200GiB, say",)


class CheckpointDisk(Optimization):
    """Layer inputs on disk, the two that are worked on in host memory."""

    id = "checkpoint_disk"
    title = "kept layer inputs on disk"
    claimed = (
        Claimed(
            37,
            "1.92 GB less than a checkpoint for each layer",
            "does not hold",
            "Layer inputs on a disk take nothing off the card; they make room in host memory, which is what ends "
            "long sequences.",
        ),
    )
    claims = frozenset({"activations/checkpoints.count"})
    makes = frozenset({"activations/stored"})
    adds = frozenset({"inputs/written", "inputs/read"})
    requires = (
        Needs("buffers/staging", "only streamed layers take their inputs one after the other"),
        _DiskAllowed(),
    )
    evidence = (
        Evidence("gradients equal stock, whatever is on disk", "tests/streamed/test_shelf.py"),
        Evidence("activations on SSDs, overlapped with training", "Wu et al. 2024, SSDTrain, arXiv 2408.10013"),
    )

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Two inputs stay in the host, the others go to the disk and come back."""
        return (
            ledger.claimed("activations/checkpoints", count=held_inputs)
            .with_terms(
                Term(
                    "activations/stored",
                    stored_inputs,
                    one_byte,
                    ALWAYS - {Phase.LOAD, Phase.MERGE},
                    "inputs of the layers on disk",
                    SOURCE,
                    device=Device.DISK,
                )
            )
            .with_work(
                Work("inputs/written", disk_traffic, Resource.DISK, Phase.FORWARD, "inputs of the layers to the disk"),
                Work("inputs/read", disk_traffic, Resource.DISK, Phase.BACKWARD, "inputs of the layers from the disk"),
            )
        )

    def apply(self, session: Session) -> None:
        """Keep layer inputs on disk."""
        session.store_checkpoints()

"""As many optimisations at once as can be, run by a card that stands in for each of four: `measure --largest`."""

from __future__ import annotations

from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.sets import largest_set
from planner.units import GIB
from reports.validation.cases import Case

CARDS = ("rtx2060s", "rtx3090", "rtx4090", "h200-sxm")
MODEL, TOKENS = "phi-2", 8192
HOST_GIB, DISK_GIB = 32, 64
SETTINGS = (
    "lora.rank=8 sequence_packing.documents=4 checkpoint_spacing.every=2 rate_range_test.steps=6 spike_rewind.every=2 "
    "cache_release.every=2 train.steps=4 train.evaluate_every=2 train.validation=0.5 train.evaluation_rows=1"
)


def largest(card: str) -> Case:
    """The run of one card's largest set."""
    model = load_model(MODEL)
    ids = {*largest_set(Situation(load_profile(card), model, HOST_GIB * GIB, disk_bytes=DISK_GIB * GIB))}
    words = [f"--{'with' if name in ids else 'without'} {name}" for name in sorted(all_optimizations())]
    words += [f"--set {word}" for word in SETTINGS.split()]
    asked = f"--gpu {card} --model random:{MODEL} --context {TOKENS} --host-ram {HOST_GIB}GiB --disk {DISK_GIB}GiB"
    return Case(f"{card}-{MODEL}-{TOKENS}-largest", " ".join([asked, *words]), rehearse=card != "h200-sxm")


LARGEST: tuple[Case, ...] = tuple(map(largest, CARDS))

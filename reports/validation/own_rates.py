"""Seconds of steps beside two estimates: by constants of a kind of card, and by what this very machine reaches.

    python -m reports.validation.own_rates CARD OUT [NAME…]

What a user does who types `plan measure` first. The machine is measured and its rates are put into CARD, one of
reports/validation/cards; each frozen plan that is named is estimated anew both ways, and written down before it is run.
OUT gets one JSON record: the profile, kernels and seconds of four kinds of small steps, and each run's estimates and
seconds by phase. The records of the runs themselves lie beside it, in a folder with its name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.cli_check import same_settings
from planner.hardware import load_profile
from planner.launches import FOUR_BIT
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.planning import make_plan
from planner.profile_file import profile_text
from reports.validation.accuracy import write_record
from reports.validation.cases import CASES
from reports.validation.measure import PLANS, run
from trainer.launch_probe import PLAIN
from trainer.machine_profile import fresh_process

STREAMED = ("lora", "chunked_loss", "streamed")
LAUNCHING = {
    "resident": PLAIN,
    "resident, four bits": (*PLAIN, "nf4_weights"),
    "streamed": STREAMED,
    "streamed, four bits": (*STREAMED, "nf4_weights"),
}


def tell(what: str) -> None:
    """Progress."""
    print(what, flush=True)


def estimates(plan: Plan, gpu: str) -> dict[str, Any]:
    """Seconds of a step of a plan's settings on a card, and of each phase."""
    time = make_plan(same_settings(plan, gpu)).time
    phases = {name: each.seconds for name, each in time.phases.items()}
    return {"step": time.step_seconds.estimate, "phases": phases}


def main() -> int:
    """See the module's docstring."""
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    card, out, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    # A process of its own, as a user's: it would hold memory of the card during the runs.
    measure = [sys.executable, "-m", "planner", "measure", "--gpu", "local", "--out", str(folder / "measured.yaml")]
    subprocess.run(measure, check=True)
    here = load_profile(str(folder / "measured.yaml"))
    own = folder / "card.yaml"
    own.write_text(profile_text(replace(load_profile(card), measured=here.measured)), encoding="utf-8")
    steps = fresh_process("trainer.launch_probe", card, *("+".join(on) for on in LAUNCHING.values()))
    launched = dict(zip(LAUNCHING, steps, strict=True))
    tell(f"small steps: {launched}")
    found: dict[str, Any] = {"profile": profile_text(here), "small_steps": launched, "runs": {}}
    found["four_bit_launches"] = FOUR_BIT  # as which a product in four bits was counted
    cases = {case.name: case for case in CASES}
    for name in names:
        plan = load_plan(PLANS / f"{name}.yaml")
        each = {"by_shared_constants": estimates(plan, card), "by_own_rates": estimates(plan, str(own))}
        found["runs"][name] = each
        write_record(out, found)
        tell(f"{name:40} {run(cases[name], PLANS / f'{name}.yaml', folder, 0)}")
        record = folder / f"{name}.json"
        if record.exists():
            took = json.loads(record.read_text(encoding="utf-8"))["step_seconds"]
            each["measured"] = {"step": took["median"], "phases": took["phases"], "each": took["each"]}
            ratio = {way: took["median"] / each[way]["step"] for way in ("by_shared_constants", "by_own_rates")}
            tell(f"{'':40} measured over estimated: {ratio}")
        write_record(out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""For docs/validation.md: constants of a step's time, as shipped and as fitted, and what they are worth elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.markdown import table
from reports.render.records import FOLDER
from reports.validation.fit import HELD, NEAR, errors_of, split

FITTED = FOLDER / "others" / "fit-of-time.json"
CONTROL = FOLDER / "others" / "h100-control-phi-2-32768-streamed.json"
CONTROLLED = FOLDER / "h100-8gib-phi-2-32768-streamed.json"


def section(path: Path = FITTED) -> str:
    """The constants, and errors of the estimates of a step's time."""
    found = json.loads(path.read_text(encoding="utf-8"))
    known, alone = split(found)
    errors = (
        ("runs fitted to, constants as shipped", found["fitted_to"]["shipped"]),
        ("the same, constants as fitted", found["fitted_to"]["fitted"]),
        ("each model in turn left out, every constant known from others", known),
        ("each model in turn left out, a constant known from it alone", alone),
        ("hold-out runs (most were in fits before), constants as shipped", found["holdout"]["shipped"]),
    )
    far = {name: one for name, one in {**known, **alone, **found["holdout"]["shipped"]}.items() if not near(one)}
    only = {name for one in found["left_out_in_turn"].values() for name in one["known_from_it_alone"]}
    rows = ((*_constant(name, one), _how(name, only)) for name, one in found["constants"].items())
    control, before = (
        json.loads(each.read_text(encoding="utf-8"))["step_seconds"]["median"] for each in (CONTROL, CONTROLLED)
    )
    return f"""## Constants of time

What formulas count (FLOPs, bytes, kernels) becomes seconds by a few constants (`planner/calibration.yaml`), fitted to
the runs above by `python -m reports.validation.fit`. The range is of fits that leave one model out. Where it is wide,
one model says much of the constant; what is known from one model alone is not tested by leaving that model out.

{table(("constant", "shipped>", "fitted>", "without one model>", "known"), rows)}
An estimate's error is the larger of measured and estimated seconds over the smaller, less one. Formulas were made with
these runs at hand, and the count of launches for a product in four bits with the small steps below: errors of models
never looked at are larger, as the hold-out runs show. Those were made on a host that took {control:.2f} s for a step of
phi-2 at 32,768 tokens, which was {before:.2f} s on another.

{table(("steps", "runs>", "median error>", "largest>", f"within {NEAR:.0%}>"), (_errors(*each) for each in errors))}
Further off than that, of those left out or held out, measured over estimated seconds:

{table(("run", "ratio>"), ((name, f"{ratio:.2f}") for name, ratio in sorted(far.items())))}
In no fit and no error above:

{table(("run", "why"), found["not_looked_at"].items())}"""


def near(ratio: float) -> bool:
    """Whether measured and estimated seconds are near each other."""
    return max(ratio, 1 / ratio) - 1 <= NEAR


def _constant(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = one["without_one_model"]
    return name.replace("_", " "), f"{one['shipped']:.3g}", f"{one['fitted']:.3g}", f"{low:.3g} to {high:.3g}"


def _how(name: str, only: set[str]) -> str:
    if name in only:
        return "from one model alone"
    if name in HELD:
        value, spread = HELD[name]
        return f"held near {value:.2f}, which is assumed, within {spread:.0%}"
    return "from several models"


def _errors(name: str, ratios: Mapping[str, float]) -> tuple[str, ...]:
    many, median, largest, within = errors_of(ratios)
    return name, str(many), f"{median:.1%}", f"{largest:.1%}", str(within)

"""For reports/validation.md: runs of the grid whose seconds were far off, made twice more on one machine."""

from __future__ import annotations

from planner.markdown import percent, table
from planner.measurements import read_records
from reports.render.grid_records import record_of
from reports.render.grid_time import launch_bound
from reports.render.records import FOLDER

REPEATED = tuple(FOLDER / "grid-repeated" / name for name in ("once", "again"))
"""Records of one machine, one process after the other: all of these runs, and then all of them again."""

FAR = 0.2
"""Of the seconds that a step took."""


def section() -> str:
    """Seconds of each running, and how near one estimate can come to all of them."""
    once, again = ({record.name: record for record in read_records(folder)} for folder in REPEATED)
    assert once.keys() == again.keys(), "each was made as often"
    runs = {name: (record_of(name), once[name], again[name]) for name in once}
    seconds = {name: [float(each.step[0] or 0) for each in of_one] for name, of_one in runs.items()}
    apart = {name: max(steps) / min(steps) for name, steps in seconds.items()}
    same = sum(len({each.allocated for each in of_one}) == 1 for of_one in runs.values())
    on_host = [name for name in runs if launch_bound(name)]
    between = {name: max(steps[1:]) / min(steps[1:]) for name, steps in seconds.items()}
    off = sum(
        abs((of_one[0].step[1] or 0) / steps[0] - 1) > FAR
        for of_one, steps in zip(runs.values(), seconds.values(), strict=True)
    )
    revisions = sorted({record.content["revision"][:7] for record in (*once.values(), *again.values())})
    # As far off as that estimate is of both whose share of the shortest is as far above 1 as that of the longest below.
    nearest = max((times - 1) / (times + 1) for times in apart.values())
    rows = [
        (name, f"{runs[name][0].step[1]:.3f}", *(f"{each:.3f}" for each in steps), f"{apart[name]:.2f}")
        for name, steps in seconds.items()
    ]
    told = (
        f"{len(runs)} runs, {off} of them planned more than {FAR:.0%} off in seconds, were made twice more by revision "
        f"{', '.join(revisions)}, from the same frozen plans, all of them and then all again on one machine "
        "(`python -m reports.validation.several OUT NAME…`, twice); records in `reports/validation/grid-repeated/`. No "
        f"figure above has them. {same} took as many bytes "
        f"each time, to the byte. {len(on_host)} of them wait for the host, which launches kernels. Seconds of the "
        f"longest running were {min(apart.values()):.2f} to {max(apart.values()):.2f} times those of the shortest, and "
        f"on the one machine still {min(between.values()):.2f} to {max(between.values()):.2f} times. So whatever is "
        f"planned before them, of one run it is off by {percent(nearest)[1:]} or more, one time or another."
    )
    heads = ("run", "planned, s>", "step, s>", "once more, s>", "and again, s>", "longest, of shortest>")
    return f"## The same run, once more and again\n\n{told}\n\n{table(heads, rows)}"

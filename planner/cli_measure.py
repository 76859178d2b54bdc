"""`plan measure`: what the machine at hand reaches, written as a profile that plans take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.cli_request import once
from planner.errors import PlanError
from planner.units import format_bytes, format_rate

if TYPE_CHECKING:
    from planner.hardware import HardwareProfile


@click.command(short_help="Measure the machine at hand.")
@once("--gpu", metavar="WHICH", help="local, the card of this machine, or cpu. [local, or cpu without a card]")
@once("--out", metavar="FILE", help="Write the profile here, not to the folder that plans look into.")
@once("--scratch", metavar="FOLDER", help="Measure this folder's disk as well, with 8 GiB of it, 1 if --quick.")
@click.option("--quick", is_flag=True, help="Less exact, in seconds.")
def measure(gpu: str | None, out: str | None, scratch: str | None, quick: bool) -> int:
    """Measure what this machine reaches: memory, products, attention, copies, launches.

    What is found becomes a profile, a YAML file as in hwprofiles/. Without --out it lies where `--gpu local` and
    `--gpu cpu` look for it; any profile can be named: `--gpu FILE`. Nothing else should run meanwhile. It needs the
    train extra.

    \b
    plan measure
    plan measure --gpu cpu --quick
    plan measure --out my-card.yaml
    plan measure --scratch /data
    """
    from planner.cli_output import check_profile_target, write_whole
    from planner.machine import cpu_profile
    from planner.own_profile import own_file
    from planner.profile_file import profile_text

    if gpu not in (None, "local", "cpu"):
        raise PlanError(f"--gpu {gpu}", "is not this machine.", "Only local and cpu can be measured.")
    if scratch is not None and not Path(scratch).expanduser().is_dir():
        raise PlanError(f"--scratch {scratch}", "is no folder.", "Name one on the disk that layer inputs would lie on.")
    card = cpu_profile() if gpu == "cpu" else _local(required=gpu == "local") or cpu_profile()
    place = Path(out) if out is not None else own_file(card)
    try:
        if out is None:
            place.parent.mkdir(parents=True, exist_ok=True)
        check_profile_target(place)
    except OSError as error:
        raise PlanError(
            str(place.parent), f"cannot be made: {error.strerror or error}.", "--out names a file."
        ) from None
    try:
        from trainer.machine_profile import measured_profile
    except ImportError as error:
        nearest = "pip install 'tierplan[train]' brings it."
        raise PlanError("plan measure", f"measuring needs the train extra ({error}).", nearest) from error
    found = measured_profile(card, _tell, quick=quick, scratch=None if scratch is None else Path(scratch))
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    write_whole(place, profile_text(found))
    for line in summary(found):
        click.echo(line)
    click.echo(f"Written: {place}")
    used = "cpu" if card.kind == "cpu" else "local"
    click.echo(f"Plan with it: plan --gpu {used if out is None else place}")
    return 0


def summary(profile: HardwareProfile) -> list[str]:
    """What was found, one line for each quantity."""
    found = profile.measured
    assert found is not None
    lines = [f"{profile.name} ({found.machine})"]
    if profile.kind == "gpu":
        shown, context = (int(fact.value or 0) for fact in (profile.visible_bytes, profile.context_bytes))
        lines.append(f"memory shown: {format_bytes(shown)}, of which a context takes {format_bytes(context)}")
    lines += [f"products, {dtype}: {format_rate(rate, 'FLOP/s')}" for dtype, rate in found.matmul.items()]
    for kernel, by_dtype in found.attention.items():
        for dtype, sizes in by_dtype.items():
            told = ", ".join(f"{format_rate(rate, 'FLOP/s')} at head size {size}" for size, rate in sizes.items())
            lines.append(f"attention, {kernel}, {dtype}: {told}")
    named = {
        "a norm, op by op, in memory": found.memory,
        "pinned copies to the host": found.to_host,
        "pinned copies from the host": found.to_device,
        "pinned copies both ways at once": found.both_ways,
        "pinning host memory": found.pinning,
        f"disk of {found.disk_folder}": found.disk,
    }
    lines += [f"{name}: {format_rate(rate, 'bytes/s')}" for name, rate in named.items() if rate is not None]
    if found.kernels_per_second is not None:
        lines.append(f"kernels launched: {found.kernels_per_second:,.0f} a second")
    if found.host_memory is not None:
        lines.append(f"host memory: {format_bytes(found.host_memory)}")
    return lines


def _local(required: bool) -> HardwareProfile | None:
    """The card of this machine; None where there is none and none was asked for."""
    from planner.machine import detect_local

    try:
        return detect_local()
    except PlanError as error:
        if required:
            raise
        click.echo(f"No card to measure: {error.why} Measuring the CPU.", err=True)
        return None


def _tell(what: str) -> None:
    """Progress, on standard error: one line that is written over where it is a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[Kmeasuring: {what}", nl=False, err=True)
    else:
        click.echo(f"measuring: {what}", err=True)

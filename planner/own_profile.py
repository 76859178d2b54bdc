"""The profile that `plan measure` wrote for this machine: where it lies, and what a plan takes from it.

It lies in the user's configuration folder, for a card under its UUID or else its name, for the CPU as ``cpu.yaml``.
What was measured on another machine, as in a home folder that machines share, is not used; a UUID is one card's alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from planner.errors import PlanError
from planner.hardware import HardwareProfile, load_profile
from planner.machine import machine_name


def folder() -> Path:
    """``$XDG_CONFIG_HOME/tierplan``, or ``~/.config/tierplan``."""
    told = os.environ.get("XDG_CONFIG_HOME", "")
    # The specification of XDG has relative paths ignored.
    return (Path(told) if told.startswith("/") else Path.home() / ".config") / "tierplan"


def own_file(profile: HardwareProfile) -> Path:
    """Where the measurement of this card, or of this machine's CPU, belongs."""
    if profile.kind == "cpu":
        return folder() / "cpu.yaml"
    return folder() / f"{profile.uuid or _by_name(profile)}.yaml"


def _by_name(profile: HardwareProfile) -> str:
    return re.sub(r"[^a-z0-9]+", "-", profile.name.lower()).strip("-")


def with_own_measurement(profile: HardwareProfile) -> HardwareProfile:
    """The profile of this machine with what was measured on it, where that was done.

    Of a file's facts it takes the context, and those that are unknown otherwise; what is visible is always asked anew.

    Raises:
        PlanError: there is a file for this machine and it cannot be used.
    """
    files = (
        [own_file(profile)] if profile.kind == "cpu" else [own_file(profile), folder() / f"{_by_name(profile)}.yaml"]
    )
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return profile
    try:
        written = load_profile(str(file))
    except PlanError as error:
        again = f"Run `plan measure --gpu {'cpu' if profile.kind == 'cpu' else 'local'}` again, or remove {file}."
        raise PlanError(f"the measurement of this machine, {file}", f"cannot be used: {error}", again) from error
    known_by_uuid = profile.uuid != "" and file.stem == profile.uuid
    if written.measured is None or written.name != profile.name:
        return profile
    measured = written.measured
    if measured.machine != machine_name():
        if not known_by_uuid:
            return profile
        measured = measured.of_the_card()
    known = {name: rate if rate.value is not None else written.rates[name] for name, rate in profile.rates.items()}
    return replace(
        profile,
        measured=measured,
        context_bytes=written.context_bytes if written.context_bytes.basis == "measured" else profile.context_bytes,
        rates=known,
    )

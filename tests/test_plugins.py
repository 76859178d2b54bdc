"""Adding an optimisation is one file, adding a card one YAML: dropped into a copy of the package, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from planner.hardware import SHIPPED

ONE_FILE = '''
"""Hold the float32 adapters' gradients on the host."""

from planner.ledger import Device
from planner.optimizations.base import Evidence, Optimization


class GradientsAway(Optimization):
    """Gradients of the adapters in host memory."""

    id = "gradients_away"
    title = "gradients on the host"
    claims = frozenset({"gradients/adapters.device"})
    evidence = (Evidence("made for a test", "tests/test_plugins.py"),)

    def rewrite(self, ledger, knobs, situation):
        return ledger.claimed("gradients/adapters", device=Device.HOST)

    def apply(self, session):
        pass
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its cards, as they are."""
    place = tmp_path_factory.mktemp("copy")
    for folder in (Path(planner.__file__).parent, SHIPPED):
        shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def _plan(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "planner", *words]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def test_a_dropped_file_is_all_it_takes(copy: Path) -> None:
    before = _plan(copy, "--gpu", "newcard", "--with", "gradients_away")
    assert before.returncode == 2 and "newcard" in before.stderr and "gradients_away" in before.stderr

    (copy / "planner" / "optimizations" / "adapters" / "gradients_away.py").write_text(ONE_FILE, encoding="utf-8")
    card = (SHIPPED / "rtx2060s.yaml").read_text(encoding="utf-8")
    card = card.replace("id: rtx2060s", "id: newcard").replace("RTX 2060 SUPER", "RTX 9999 TEST")
    aliases = next(line for line in card.splitlines() if line.startswith("aliases:"))
    (copy / "hwprofiles" / "newcard.yaml").write_text(card.replace(aliases, "aliases: []"), encoding="utf-8")

    report = _plan(copy, "--gpu", "newcard", "--with", "gradients_away")
    assert report.returncode == 0, report.stderr
    assert "RTX 9999 TEST" in report.stdout and "gradients_away" in report.stdout
    plan = json.loads(_plan(copy, "--gpu", "newcard", "--with", "gradients_away", "--json").stdout)
    assert "gradients/adapters" in plan["memory"]["host"]["terms"]
    assert all("gradients/adapters" not in terms for terms in plan["memory"]["gpu"]["phases"].values())
    assert "newcard" in _plan(copy, "gpus").stdout
    assert "gradients_away" in _plan(copy, "optimizations").stdout

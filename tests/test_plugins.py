"""Adding an optimisation touches one file, adding a card one YAML: both are done here at run time."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.cli import main
from planner.hardware import FOLDERS_VARIABLE, SHIPPED
from planner.optimizations.base import REGISTRY

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


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = tmp_path / "gradients_away.py"
    module.write_text(ONE_FILE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("gradients_away", module)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["gradients_away"] = loaded
    spec.loader.exec_module(loaded)
    card = (SHIPPED / "rtx2060s.yaml").read_text(encoding="utf-8")
    card = card.replace("id: rtx2060s", "id: newcard").replace("RTX 2060 SUPER", "RTX 9999 TEST")
    aliases = next(line for line in card.splitlines() if line.startswith("aliases:"))
    (tmp_path / "newcard.yaml").write_text(card.replace(aliases, "aliases: []"), encoding="utf-8")
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    yield
    REGISTRY.pop("gradients_away")
    sys.modules.pop("gradients_away")


def test_both_are_found_in_the_report(plugins: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "newcard", "--with", "gradients_away"]) == 0
    report = capsys.readouterr().out
    assert "RTX 9999 TEST" in report and "gradients_away" in report
    assert main(["--gpu", "newcard", "--with", "gradients_away", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "gradients/adapters" in plan["memory"]["host"]["terms"]
    assert all("gradients/adapters" not in terms for terms in plan["memory"]["gpu"]["phases"].values())
    assert main(["gpus"]) == 0 and "newcard" in capsys.readouterr().out
    assert main(["optimizations"]) == 0 and "gradients_away" in capsys.readouterr().out

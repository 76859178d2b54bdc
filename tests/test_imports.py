"""Planning stays light: it loads no training library; and this check is shown to be able to fail."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "sympy",
    "pandas",
}
RUN = """
import contextlib, io, json, sys
from planner.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def loaded(*arguments: str, first_on_path: Path | None = None) -> tuple[int, set[str]]:
    """Exit code of a command in a fresh process, and the packages it loaded."""
    path = [str(first_on_path)] if first_on_path else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert not done.stderr, done.stderr
    code, modules = json.loads(done.stdout)
    return code, set(modules)


def test_planning_loads_no_training_library_and_no_sympy() -> None:
    code, modules = loaded("--gpu", "rtx2060s")
    assert code == 0
    assert {"planner", "numpy"} <= modules, "the command did plan"
    assert not modules & HEAVY
    assert "trainer" not in modules


@pytest.mark.parametrize("arguments", [("--help",), ("explain", "--help")])
def test_help_loads_not_even_what_planning_needs(arguments: tuple[str, ...]) -> None:
    code, modules = loaded(*arguments)
    assert code == 0
    assert not modules & (HEAVY | {"numpy", "pydantic", "rich", "yaml"})


def test_lists_need_no_numpy() -> None:
    assert not loaded("gpus", "--json")[1] & (HEAVY | {"numpy", "rich"})
    assert not loaded("models", "--json")[1] & (HEAVY | {"numpy", "rich"})


def test_explaining_loads_sympy_alone() -> None:
    code, modules = loaded("explain", "S", "--context", "1K", "--gpu", "h200-sxm", "--model", "smollm2-135m")
    assert code == 0
    assert modules & HEAVY == {"sympy"}


def test_the_check_fails_when_a_plug_in_loads_torch(tmp_path: Path) -> None:
    """Were the planner to load torch, the first test would say so."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "careless_plug_in.py").write_text("import torch\n")
    facts = tmp_path / "careless_plug_in-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: careless-plug-in\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[planner.optimizations]\ncareless = careless_plug_in\n")

    code, modules = loaded("--gpu", "rtx2060s", first_on_path=tmp_path)
    assert code == 0
    assert modules & HEAVY == {"torch"}


def imported_in(source: str) -> set[str]:
    """Top-level packages that a source names in any import, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_no_file_of_the_planner_names_a_training_library() -> None:
    forbidden = {"torch", "transformers", "peft", "bitsandbytes"}
    sources = sorted((ROOT / "planner").rglob("*.py"))
    assert len(sources) > 20
    assert {path.name: imported_in(path.read_text()) & forbidden for path in sources} == {
        path.name: set() for path in sources
    }


def test_the_source_check_sees_an_import_inside_a_function() -> None:
    assert imported_in("def f():\n    from torch.nn import Linear\n") == {"torch"}
    assert imported_in("import torch.nn as nn, os") == {"torch", "os"}


@pytest.mark.parametrize("own", ["", "expandable_segments:False"])
def test_memory_of_the_card_grows_by_pages_unless_the_user_says_otherwise(own: str) -> None:
    """torch reads the setting once, when it is loaded, so importing the trainer makes it."""
    told = "import os, trainer; print(os.environ['PYTORCH_ALLOC_CONF'])"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    env = kept | ({"PYTORCH_ALLOC_CONF": own} if own else {})
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == (own or "expandable_segments:True,large_segment_size_mb:16")

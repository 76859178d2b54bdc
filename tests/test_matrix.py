"""Tables of many plans: their rows are what planning each alone gives."""

from __future__ import annotations

import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_fixture import Capture, answered, mistakes

from planner.calibration import calibration
from planner.cli import main
from planner.compose import Configuration
from planner.errors import PlanError
from planner.evaluate import Candidates, Evaluator
from planner.matrix import COLUMNS, MatrixRow, all_cards, all_models, matrix, rows_of_model
from planner.matrix_files import as_csv, as_markdown
from planner.pareto import Settings, pareto
from planner.planning import Request, make_plan, solved
from planner.tier_table import TierRow, tier_table
from planner.tiers import TIERS

SAMPLE = random.Random(7)
PAIRS = [(SAMPLE.choice(all_models()), tuple(SAMPLE.sample(all_cards(), 6))) for _ in range(8)]
WISHES = (
    Request(),
    Request(host_bytes=2**33, max_step_seconds=60.0),
    Request(excluded=("nf4_weights",), knobs={"lora": {"rank": 16}}),
)


def planned(gpu: str, model: str, wish: Request) -> MatrixRow:
    """The row as a plan of its own gives it."""
    kept = {"host_bytes": wish.host_bytes, "max_step_seconds": wish.max_step_seconds}
    try:
        plan = make_plan(Request(gpu=gpu, model=model, excluded=wish.excluded, knobs=wish.knobs, **kept))
    except PlanError as error:
        return MatrixRow(gpu, model, None, why=" ".join(each.why for each in getattr(error, "errors", [error])))
    fits = plan.verdict == "fits"
    return MatrixRow(
        gpu,
        model,
        fits,
        plan.tier if fits else None,
        plan.total_tokens if fits else None,
        plan.lora_rank,
        plan.longest.all_trained,
        plan.memory.gpu.peak_bytes.high,
        plan.memory.gpu.budget_bytes,
        plan.memory.host.peak_bytes,
        plan.time.step_seconds.estimate,
    )


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_a_row_is_what_the_plan_says(number: int) -> None:
    model, gpus = PAIRS[number]
    wish = WISHES[number % len(WISHES)]
    for row in rows_of_model(model, gpus, wish):
        alone = planned(row.gpu, model, wish)
        if row.fits is False:
            assert "lacks" in row.why or "too long" in row.why
            alone = MatrixRow(**{**alone.document(), "why": row.why})
        assert row == alone


def test_a_row_knows_of_last_resorts() -> None:
    """Windows and few heads: here attention by blocks trains a longer sequence, and every set without it does not."""
    (row,) = rows_of_model("gemma-3-1b", ("rtx2060s",), Request())
    (without,) = rows_of_model("gemma-3-1b", ("rtx2060s",), Request(excluded=("sequence_blocks",)))
    assert row == planned("rtx2060s", "gemma-3-1b", Request())
    assert (row.longest_all_trained or 0) > (without.longest_all_trained or 0)


def test_several_processes_give_the_same_in_the_same_order() -> None:
    gpus, models = ["rtx4090", "rx7900xtx", *all_cards()[:40]], ["smollm2-135m", "gpt2"]
    seen: list[int] = []
    rows = matrix(gpus, models, Request(), done=seen.append, processes=2)
    assert [(row.gpu, row.model) for row in rows] == [(gpu, model) for gpu in gpus for model in models]
    assert sum(seen) == len(rows)
    assert rows == matrix(gpus, models, Request(), processes=1)


def test_nothing_is_dropped() -> None:
    rows = matrix(["rtx2060s", "rx7900xtx"], ["phi-2", "gpt-oss-20b"], Request())
    told = {(row.gpu, row.model): row for row in rows}
    assert told["rtx2060s", "phi-2"].tier == 7 and told["rtx2060s", "phi-2"].why == ""
    assert "cuda_context" in told["rx7900xtx", "phi-2"].why
    refused = told["rtx2060s", "gpt-oss-20b"]
    assert refused.why and refused.fits is None
    with pytest.raises(PlanError, match=r"rtx206[^0]*.*\n.*phi-3"):
        matrix(["rtx206"], ["phi-3"], Request())


def children_of(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def processor_seconds(processes: Sequence[int]) -> float:
    """Of the one that has had least; nothing where there is none."""
    stats = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in processes]
    return min((int(stat[11]) / os.sysconf("SC_CLK_TCK") for stat in stats), default=0.0)


def test_who_is_interrupted_does_not_wait_for_the_models_to_come() -> None:
    command = [sys.executable, "-m", "planner", "matrix", "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # which who runs tests in the background ignores
    ) as run:
        while run.poll() is None and processor_seconds(children_of(run.pid)) < 0.5:  # until they plan
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        out, told = run.communicate(timeout=60)
    assert (run.returncode, out) == (130, b""), told
    assert told.strip().endswith(b"error: interrupted.")


def test_a_table_of_long_names_shows_them_whole(capsys: Capture) -> None:
    assert main(["matrix", "--gpu", "rtx3060-12gb", "--model", "deepseek-coder-1.3b"]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert first[0] + second[0] == "rtx3060-12gb" and first[1] + second[1] == "deepseek-coder-1.3b"


def test_csv_and_markdown_hold_every_row(tmp_path: Path, capsys: Capture) -> None:
    rows = matrix(["rtx2060s", "rx7900xtx"], ["phi-2"], Request())
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [*read[0]] == [*COLUMNS] and read[0]["tier"] == "7" and read[0]["fits"] == "true"
    assert read[1]["tier"] == "" and read[1]["why"] == rows[1].why
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    arguments = ["matrix", "--gpu", "rtx2060s", "--gpu", "rx7900xtx", "--model", "phi-2"]
    for name, text in (("t.csv", as_csv(rows)), ("t.md", as_markdown(rows))):
        for _ in range(2):  # a matrix may be written over a matrix
            assert main([*arguments, "--out", str(tmp_path / name)]) == 0
            assert (tmp_path / name).read_text(encoding="utf-8") == text
    capsys.readouterr()
    (tmp_path / "own.csv").write_text("mine\n", encoding="utf-8")
    assert "not overwritten" in mistakes(capsys, *arguments, "--out", str(tmp_path / "own.csv"))[0]
    assert "neither .csv nor .md" in mistakes(capsys, *arguments, "--out", str(tmp_path / "x.txt"))[0]
    assert "no folder" in mistakes(capsys, *arguments, "--out", str(tmp_path / "no" / "x.md"))[0]
    wrong = mistakes(capsys, *arguments, "--out", "x.txt", "--with", "nothing", "--gpu", "rtx206", "--host-ram", "8G")
    assert len([line for line in wrong if line.startswith("error")]) == 4, "every mistake at once"
    found = answered(capsys, *arguments, "--json")
    assert found == {"rows": [row.document() for row in rows]}
    assert main(["matrix", "--gpu", "rtx2060s", "--model", "gpt-oss-20b"]) == 2, "as `plan` does"


def tier_as_planned(number: int, wish: Request) -> TierRow:
    plan = make_plan(replace(wish, tier=number))
    return TierRow(
        number,
        plan.context,
        plan.target,
        plan.total_tokens,
        plan.lora_rank,
        plan.verdict == "fits",
        tuple(choice.id for choice in plan.choices),
        {choice.id: choice.knobs for choice in plan.choices if choice.knobs},
        plan.memory.gpu.peak_bytes.high,
        plan.memory.host.peak_bytes,
        plan.memory.disk.training_bytes,
        plan.time.step_seconds.estimate,
        {},
    )


@pytest.mark.parametrize(
    "wish",
    [
        Request(disk_bytes=2**36),
        Request("rtx4090", "llama-3.1-8b", max_step_seconds=300.0),
        Request("h200-sxm", "qwen3-1.7b"),
    ],
)
def test_a_tier_is_what_its_plan_says(wish: Request) -> None:
    table = tier_table(wish)
    assert [row.tier for row in table.tiers] == [tier.number for tier in TIERS]
    for row in table.tiers:
        alone = tier_as_planned(row.tier, wish)
        assert TierRow(**{**vars(row), "lacks": {}}) == alone
        over = {
            "card": row.gpu_high_bytes - table.gpu_budget_bytes,
            "host": row.host_bytes - table.host_budget_bytes,
            "disk": row.disk_bytes - wish.disk_bytes,
            "seconds": (row.step_seconds or 0) - table.limit_seconds,
        }
        assert row.fits is (not row.lacks) and set(row.lacks) == {name for name, size in over.items() if size > 0}
        assert all(row.lacks[name] == pytest.approx(over[name], rel=1e-4) for name in row.lacks)
        assert all(word in row.reason for word in ({"seconds": "step"}.get(name, name) for name in row.lacks))


def test_tiers_tells_and_exits(capsys: Capture) -> None:
    found = answered(capsys, "tiers", "--gpu", "rtx2060s", "--json")
    assert [row["tier"] for row in found["tiers"] if row["fits"]] == [1, 2, 3, 4, 5, 6, 7]
    # What comes nearest lacks no more than it has to: with so much host memory the card would do.
    assert found["tiers"][7]["reason"].startswith("host lacks") and {*found["tiers"][7]["lacks"]} == {"host"}
    assert {*found["tiers"][8]["lacks"]} == {"host", "seconds"}
    assert found["tiers"][9]["reason"].startswith("card lacks") and found["tiers"][9]["lacks"]["card"] > 0
    assert main(["tiers", "--gpu", "rtx2060s"]) == 0
    out = capsys.readouterr().out
    assert "tier 7" in out and "card lacks" in out and "host lacks" in out and "streamed_weights" in out
    assert main(["tiers", "--gpu", "rtx2060s", "--model", "llama-3.1-70b"]) == 1
    assert "no tier fits" in capsys.readouterr().out
    assert "names no card" in mistakes(capsys, "tiers")[0]
    wrong = mistakes(capsys, "tiers", "--gpu", "rtx206", "--host-ram", "8G", "--with", "nothing")
    assert len([line for line in wrong if line.startswith("error")]) == 3
    with pytest.raises(PlanError, match="takes no length"):
        tier_table(Request(tier=3))


# Of the executor in passes all but one size are pinned: all values of all of them take too long to count one by one.
SIZES = {"streamed": {"chunk": 2048, "heads": 2}, "chunked_loss": {"rows": 1024}, "checkpoint_spacing": {"every": 3}}
FRONTS = (
    Request(knobs={"lora": {"rank": 12}, **SIZES}),
    Request("h200-sxm", "qwen3-1.7b", target=512, excluded=("streamed",)),
    Request("rtx3060-12gb", "llama-3.1-8b", max_step_seconds=20.0, excluded=("fused_activation",), knobs=SIZES),
)


@pytest.mark.parametrize("wish", FRONTS)
def test_the_front_is_that_of_counting_everything(wish: Request) -> None:
    """Every set with every knob, each brought to its longest sequence by halving, one at a time."""
    made = solved(wish, below=False)
    rank = int(wish.knobs.get("lora", {}).get("rank", 8))

    def at(total: int) -> Evaluator:
        target = min(total, wish.target or total)
        one = Candidates(np.array([total]), np.array([target]), np.array([rank]))
        return Evaluator(one, made.situation, calibration(), made.limits)

    kept: dict[int, Evaluator] = {}

    def fits(total: int, configuration: Configuration) -> bool:
        kept.setdefault(total, at(total))
        return bool(kept[total](configuration).fits[0])

    def longest(configuration: Configuration) -> int:
        low, high = 0, 2**18  # units of 64 tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(64 * middle, configuration) else (low, middle)
        return 64 * low if 64 * low >= max(64, wish.target or 0) else 0

    every = [outcome.configuration for outcome in made.found.outcomes]
    settings = [each for each in every if each.knobs.get("streamed", {}).get("staging", "host") == "host"]
    lengths = {number: longest(configuration) for number, configuration in enumerate(settings)}
    points = []  # every setting at its own longest sequence, and at those of the others that it can train
    for total in {*lengths.values()} - {0}:
        for number, configuration in enumerate(settings):
            if lengths[number] >= total:
                alone = kept[total](configuration)
                time = float(alone.time.estimate[0]) / total
                points.append((total, time, int(alone.host[0]), configuration.ids, lengths[number] == total))
    front = {
        (total, host)
        for total, time, host, _, own in points
        if own
        and not any(
            (other[0] >= total and other[1] <= time * (1 - 1e-12) and other[2] <= host)
            or (other[0] > total and other[1] <= time * (1 + 1e-12) and other[2] <= host)
            or (other[0] >= total and other[1] <= time * (1 + 1e-12) and other[2] < host)
            # One that can train more still costs no more here.
            or (other[0] >= total and other[1] <= time * (1 + 1e-12) and other[2] <= host and not other[4])
            for other in points
        )
    }
    heard: list[tuple[int, int]] = []
    found = pareto(wish, lambda done, of: heard.append((done, of)))
    assert heard[-1] == (found.settings, found.settings) and heard == sorted(heard), "it goes up to the end"
    assert 0 < found.fitting <= found.settings <= len(settings)
    assert {(point.total_tokens, point.host_bytes) for point in found.points} == front
    assert (Settings(made, rank).longest() > 0).sum() == found.fitting
    assert max(front)[0] == max(lengths.values())
    own = {(total, host, ids) for total, _, host, ids, own in points if own}
    for point in found.points:
        assert (point.total_tokens, point.host_bytes, point.optimizations) in own


def test_pareto_tells_and_exits(capsys: Capture) -> None:
    # Of whole layers alone, which are few settings; tests/test_readme.py goes through all of them.
    words = ("pareto", "--gpu", "rtx2060s", "--without", "streamed")
    found = answered(capsys, *words, "--json")
    lengths = [point["total_tokens"] for point in found["points"]]
    assert lengths == sorted(lengths, reverse=True) and found["rank"] == 8
    assert main(list(words)) == 0
    assert f"{lengths[0]:,}" in capsys.readouterr().out
    assert main(["pareto", "--gpu", "rtx2060s", "--model", "llama-3.1-70b"]) == 1
    capsys.readouterr()
    assert "names no card" in mistakes(capsys, "pareto")[0]
    # A card without rates has no times: length and host memory alone are compared.
    unrated = pareto(Request("gtx1080ti", "smollm2-135m", excluded=("streamed",)))
    assert unrated.points

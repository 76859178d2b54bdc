"""Whole runs on the CPU: what they write and refuse, that they repeat, and that the probe leaves no trace."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch.nn.functional import cross_entropy
from trainer_tiny import make_plan, save_model, write_sources
from transformers import AutoModelForCausalLM, AutoTokenizer

from planner.documents import read_documents
from planner.errors import PlanError
from planner.plan import DiskMemory, Plan, Train
from trainer import running
from trainer.built import BuiltRun
from trainer.data import NOT_TRAINED, collate, evaluation_batches, prepare
from trainer.measure import Recorder
from trainer.output import RunFolder
from trainer.probing import probe
from trainer.rates import Rates
from trainer.run import execute
from trainer.session import ResidentSession
from trainer.step import nothing
from trainer.training import planned_steps

LEAN: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "gradient_checkpointing": {},
    "chunked_loss": {"rows": 16},
    "exact_attention": {"kernel": "cpu"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, **given: Any) -> Plan:
    options = {
        "steps": 8,
        "lr": 1e-2,
        "batch": 2,
        "accumulation": 2,
        "evaluation_rows": 5,
        "validation": 0.25,
    }
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=LEAN, **(options | given))


def _built(place: Path, plan: Plan | None = None, *, eight_bit: bool = False) -> BuiltRun:
    session = ResidentSession(plan or _plan(place, place / "nowhere"))
    session.adapt(rank=4, alpha=8)
    session.checkpoint_layers()
    session.chunk_loss(rows=16)
    session.attend_with("cpu")
    if eight_bit:
        session.optimize_with("adamw_8bit")
    return session.build()


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    out = place / "finished"
    assert execute(_plan(place, out)) == 0
    return out


def test_run_learns_and_writes_everything(finished: Path, place: Path) -> None:
    record = json.loads((finished / "measurement.json").read_text())
    assert record["evaluation"]["after"]["perplexity"] < 0.95 * record["evaluation"]["before"]["perplexity"]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step", line.get("evaluation")) for line in lines] == ["before", *range(1, 9), "after"]
    assert [line["loss"] for line in lines[1:-1]] == record["losses"]
    assert yaml.safe_load((finished / "plan.yaml").read_text()) == _plan(place, finished).document()
    assert any((finished / "tensorboard").iterdir())
    card = (finished / "adapter" / "README.md").read_text()
    assert "Held-out perplexity" in card and "8 steps" in card
    assert sorted(path.name for path in finished.iterdir()) == [
        "adapter", "measurement.json", "metrics.jsonl", "plan.yaml", "tensorboard",
    ]  # fmt: skip


def test_record_holds_what_was_promised(finished: Path) -> None:
    record = json.loads((finished / "measurement.json").read_text())
    assert record["set"] is None and record["executor"] == "resident"
    assert record["layers_run"] == record["layers"] == 3 and record["tokens_held"] == 64
    measured = record["measured"]
    step, evaluation = {"forward", "loss", "backward", "optimizer"}, {"evaluate", "evaluate_loss"}
    assert set(measured["phases"]) == step | evaluation
    peaks = [phase["allocated_bytes"] for phase in measured["phases"].values()]
    assert measured["gpu"] == {"allocated_bytes": max(peaks), "reserved_bytes": None, "driver_bytes": None}
    terms = measured["terms"]
    parameters = 4 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert terms["adapters"] == terms["gradients"] == 4 * parameters
    assert terms["optimizer"] == 8 * parameters + 4 * 3 * 7 * 2
    assert min(peaks) > sum(terms.values())
    assert measured["host"]["anonymous_bytes"] > sum(terms.values()) and measured["host"]["pinned_bytes"] == 0
    assert len(record["step_seconds"]["each"]) == 8 and record["step_seconds"]["median"] > 0
    phases = record["step_seconds"]["phases"]
    assert set(phases) == step and all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) <= sum(record["step_seconds"]["each"]), "all phases lie within steps"
    assert record["environment"]["packages"]["torch"] == torch.__version__
    assert Plan.model_validate_json(json.dumps(record["plan"])).document() == record["plan"]


def test_adapter_gives_the_same_loss_through_plain_peft(finished: Path, place: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, finished / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "adapter")
    data = prepare(
        read_documents(place / "data"),
        lambda texts: [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        length=32,
        target=None,
        validation=0.25,
        seed=0,
    )
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in evaluation_batches(data.validation, 5, 1, 0):
            logits = model(input_ids=batch.inputs).logits.flatten(0, 1)
            total += float(cross_entropy(logits, batch.targets.flatten(), ignore_index=NOT_TRAINED, reduction="sum"))
            tokens += batch.trained
    after = json.loads((finished / "measurement.json").read_text())["evaluation"]["after"]
    assert tokens == after["tokens"]
    assert math.isclose(total / tokens, after["loss"], rel_tol=1e-5)


def test_equal_runs_give_equal_losses_and_adapters(finished: Path, place: Path, tmp_path: Path) -> None:
    assert execute(_plan(place, tmp_path / "again")) == 0
    first, second = (json.loads((out / "measurement.json").read_text()) for out in (finished, tmp_path / "again"))
    assert first["losses"] == second["losses"] and first["evaluation"] == second["evaluation"]
    name = "adapter/adapter_model.safetensors"
    assert (finished / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_over_the_bound_nothing_is_trained(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"32 tokens on CPU: the probe step took .* KiB .*%\) more than the plan's"):
        execute(_plan(place, tmp_path / "out", high=100_000))
    record = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert record["measured"]["gpu"]["allocated_bytes"] > 100_000 and record["losses"] == []
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_interrupted_run_keeps_its_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = running.train_steps

    def interrupted(*args: Any) -> Any:
        for step in steps(*args):
            yield step
            if step["step"] == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(running, "train_steps", interrupted)
    assert execute(_plan(place, tmp_path / "out")) == 130
    assert "after step 3" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "measurement.json").exists()


@pytest.mark.parametrize(("given", "why"), [
    ({"data": None}, r"train\.data"),
    ({"verdict": "does-not-fit"}, "does not fit"),
    ({"validation": 0.5, "data": "one.txt"}, "needs two documents"),
])  # fmt: skip
def test_plans_that_cannot_be_run_are_refused(
    place: Path, tmp_path: Path, given: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("one document is not two")
    options = {"data": str(place / "data")} | given
    with pytest.raises(PlanError, match=why):
        execute(make_plan(place / "model", out="out", choices=LEAN, **options))
    assert not Path("out").exists()


def test_a_disk_without_room_is_refused_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    plan = _plan(place, tmp_path / "deep" / "out")
    free = shutil.disk_usage(tmp_path).free
    for needed, refused in ((2 * free, True), (free // 2, False)):
        memory = plan.memory.model_copy(update={"disk": DiskMemory(peak_bytes=needed, terms={"adapters/file": needed})})
        asked = plan.model_copy(update={"memory": memory})
        if refused:
            with pytest.raises(PlanError, match=r"needs .*iB on disk, and .*iB are free\..*--set train\.out="):
                execute(asked)
        else:
            RunFolder(asked)
    assert not (tmp_path / "deep").exists()


def test_a_folder_in_use_is_refused(place: Path, finished: Path) -> None:
    before = sorted(path.name for path in finished.iterdir())
    with pytest.raises(PlanError, match=r"not empty.*--set train\.out="):
        execute(_plan(place, finished))
    assert sorted(path.name for path in finished.iterdir()) == before


def test_a_lost_loss_stops_the_run(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"loss of step \d+ is nan|norm is"):
        execute(_plan(place, tmp_path / "out", lr=1e38, schedule="constant", warmup=0.0))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_probe_leaves_no_trace(place: Path, eight_bit: bool) -> None:
    plan = _plan(place, place / "nowhere")
    probed, untouched = (_built(place, plan, eight_bit=eight_bit) for _ in range(2))
    torch.manual_seed(5)
    with Recorder(probed.device) as recorder:
        probe(plan, probed, recorder)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    data = prepare(read_documents(place / "data"), probed.tokenise, length=32, target=None, validation=0.0, seed=0)
    losses = []
    for built in (probed, untouched):
        with Recorder(built.device) as recorder:
            losses.append([step["loss"] for step in running.train_steps(plan, built, data, recorder)])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(probed.trained, untouched.trained, strict=True))


def test_accumulated_gradients_are_those_of_one_large_batch(place: Path) -> None:
    plan = _plan(place, place / "nowhere", validation=0.0)
    built = _built(place, plan)
    generator = torch.Generator().manual_seed(1)
    for parameter in built.trained:  # B starts at zero, and A then has no gradient
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    data = prepare(read_documents(place / "data"), built.tokenise, length=29, target=None, validation=0.0, seed=0)
    rows = sorted(data.train.rows, key=lambda row: row.inputs)[:5]
    assert len({row.inputs for row in rows}) > 1  # a mean of means would be wrong

    def gradients(size: int) -> list[torch.Tensor]:
        built.optimizer.zero_grad(set_to_none=False)
        divisor = torch.tensor(float(sum(row.trained for row in rows)))
        for start in range(0, len(rows), size):
            built.loss(collate(rows[start : start + size]), divisor, nothing).backward()
        return [parameter.grad.clone() for parameter in built.trained]

    whole = gradients(5)
    for size in (1, 2):
        for one, other in zip(gradients(size), whole, strict=True):
            assert (one - other).norm() <= 2e-5 * other.norm()


@given(
    steps=st.integers(1, 200),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_learning_rate_rises_then_never_rises_again(steps: int, warmup: float, schedule: str) -> None:
    train = Train(warmup=warmup, schedule=schedule)
    factors = [Rates().factor(train, done, steps) for done in range(steps)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1
    top = factors.index(1.0)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@given(
    rows=st.integers(1, 300),
    batch=st.integers(1, 9),
    accumulation=st.integers(1, 9),
    epochs=st.integers(1, 3),
)
def test_epochs_are_counted_in_steps(rows: int, batch: int, accumulation: int, epochs: int) -> None:
    train = Train(batch=batch, accumulation=accumulation, epochs=float(epochs))
    steps = planned_steps(train, rows)
    needed = epochs * math.ceil(rows / batch)
    assert (steps - 1) * accumulation < needed <= steps * accumulation
    assert planned_steps(Train(steps=7), rows) == 7

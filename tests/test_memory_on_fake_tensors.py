"""The formulas against the trainer's own step at real widths: every family, every switch, random sets of them.

A step runs on fake tensors, so a model of any width and a sequence of any length cost seconds and no memory
(``trainer/fake_step.py``). When a library changes what it saves, this is what notices.
"""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest

from planner.compose import compose, problems
from planner.hardware import load_profile
from planner.ledger import Device, Term
from planner.model import load_model, shipped_folder
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request, make_plan
from trainer.fake_step import Counted, counted, predicted

# One model of each family; the first five are run at full depth as well.
MODELS = (
    "phi-2",
    "llama-3.2-1b",
    "qwen3-1.7b",
    "gemma-3-1b",
    "mistral-7b-v0.3",
    "qwen2.5-0.5b",
    "phi-4-mini",
    "granite-3.1-2b",
    "smollm3-3b",
    "starcoder2-3b",
    "pythia-1b",
    "gemma-2-2b",
    "gpt2",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "gpt-oss-20b",
)
LINEAR = ("exact_attention", "blockwise_attention")
"""What keeps attention from storing its scores."""
TERABYTE = 2**40
CLOSE = 0.01


def shortened(model: str, layers: int, folder: Path) -> Path:
    """The shipped model with so many layers and all its widths."""
    source = shipped_folder(model)
    assert source is not None
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = layers
    for name in ("layer_types", "no_rope_layers"):
        if config.get(name):
            config[name] = config[name][-layers:]
    config.pop("quantization_config", None)  # GPT-OSS is published in four bits, and planned from 16-bit weights
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def planned(
    source: str, card: str, on: set[str], total: int, *, rank: int = 8, target: int | None = None, batch: int = 1
) -> Plan:
    """A plan with exactly these optimisations, whether or not it fits.

    Where layers run in passes a slice of the loss is no longer than any chunk (``planner.streamed_memory.loss_rows``).
    Few documents share a row: each is a call of its own, and counting many takes long.
    """
    few = {"sequence_packing": {"documents": 16}} | ({"chunked_loss": {"rows": 1024}} if "streamed" in on else {})
    few = {name: knobs for name, knobs in few.items() if name in on}
    return make_plan(
        Request(
            gpu=card,
            model=f"random:{source}",
            total_tokens=total,
            target=target,
            required=tuple(sorted(on)),
            excluded=tuple(sorted(set(all_optimizations()) - on)),
            knobs={"lora": {"rank": rank}} | few,
            train={"batch": batch},
            host_bytes=TERABYTE,
        )
    )


def assert_as_planned(plan: Plan) -> Counted:
    """The peak of the whole step is the planned one within a hundredth, and no phase of it stands above its plan."""
    found, said = counted(plan), predicted(plan)
    peak = max(found.phases.values())
    assert max(said.values()) == pytest.approx(peak, rel=CLOSE), (found, said)
    for phase in ("loss", "backward"):
        assert found.phases[phase] <= said[phase] + CLOSE * peak, phase
    return found


@cache
def situation(card: str, model: str) -> Situation:
    return Situation(load_profile(card), load_model(model), TERABYTE)


def able(card: str, model: str, ids: set[str]) -> bool:
    return not problems(ids, situation(card, model))


def with_attention(ids: set[str], card: str, model: str) -> set[str]:
    """The set with the attention that stores no scores."""
    return next(found for name in LINEAR if able(card, model, found := ids | {name}))


def at_most(total: int, model: str) -> int:
    """So many tokens, or as many as the model has positions for."""
    return min(total, load_model(model).most_tokens or total)


def on_card(ids: set[str], card: str, model: str) -> tuple[dict[str, Term], dict[str, int]]:
    """The terms on the card and the letters of their formulas: what a step on fake tensors can tell."""
    made = compose(ids, {}, situation(card, model))
    terms = {name: term for name, term in made.ledger.terms.items() if term.device is Device.GPU}
    return terms, dict(made.letters)


def singles(model: str, card: str) -> list[set[str]]:
    """A set for a small card, as it is and with each optimisation switched the other way; only valid ones.

    Those that change nothing on the card (learning rates, what is kept in host memory or on disk) with one model alone,
    and copies and states of adapters, which no layer has to do with, with the first models.
    """
    base = with_attention({"lora", "mixed_precision", "gradient_checkpointing", "chunked_loss"}, card, model)
    sets = [base ^ {name} for name in all_optimizations() if name != "lora"]
    plain = on_card(base, card, model)
    able_to = [ids for ids in sets if able(card, model, ids)]
    own = {"adamw_8bit", "lookahead", "weight_averaging"} if model not in MODELS[:5] else set()
    changing = [ids for ids in able_to if on_card(ids, card, model) != plain and not own & (ids ^ base)]
    return [base, *(able_to if model == MODELS[1] else changing)]


def card_for(model: str, card: str) -> str:
    """The card, or one with bfloat16 and grouped products where the model needs them."""
    return card if able(card, model, {"lora", "mixed_precision"}) else "rtx4090"


CARDS = {
    model: card_for(model, card)
    for model, card in zip(MODELS, cycle(("rtx4090", "h200-sxm", "rtx2060s")), strict=False)
}
SINGLES = [(model, card, ids) for model, card in CARDS.items() for ids in singles(model, card)]


@pytest.mark.parametrize(
    ("model", "card", "on"), SINGLES, ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else value
)
def test_each_switch_alone(tmp_path: Path, model: str, card: str, on: set[str]) -> None:
    total = at_most(4096 if on & {*LINEAR} else 2048, model)
    assert_as_planned(planned(str(shortened(model, 3, tmp_path / model)), card, on, total))


def drawn(seed: int) -> tuple[str, str, set[str], int, int | None, int, int]:
    """By chance: model, card, a valid set with LoRA in it, length from 2K to 8K, target, batch and rank."""
    chance = random.Random(seed)
    ids: set[str] = set()
    while not ids:
        model, card = chance.choice(MODELS), chance.choice(("rtx2060s", "rtx3090", "rtx4090", "h200-sxm"))
        ids = next((least for least in ({"lora"}, {"lora", "mixed_precision"}) if able(card, model, least)), set())
    wanted = [name for name in all_optimizations() if chance.random() < 0.6]
    chance.shuffle(wanted)
    wanted.sort(key=lambda name: name != "streamed" or seed % 2)  # else it comes where nothing stands in its way
    # One after the other, each where the set bears it: what needs another comes in once that is there.
    while more := next((name for name in wanted if name not in ids and able(card, model, ids | {name})), None):
        ids.add(more)
    short = "streamed" in ids or not ids & {*LINEAR}  # passes are many calls, and stored scores are large
    lengths = (2048, 2500) if short else (2048, 3000, 4096, 8192)
    total = at_most(chance.choice(lengths), model)
    target = chance.choice((None, total // 4))
    target = None if "streamed" in ids else target  # counted for rows of every length (`planner.streamed_memory`)
    return model, card, ids, total, target, chance.choice((1, 1, 2)), chance.choice((4, 16, 64))


RANDOM_SETS = 50


def test_readme_tells_how_many_there_are() -> None:
    families = {load_model(model).model_type for model in MODELS}
    assert (RANDOM_SETS, len(families)) == (50, 16)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert "fifty random valid sets, sixteen families" in readme


@pytest.mark.parametrize("seed", range(RANDOM_SETS))
def test_random_valid_sets(tmp_path: Path, seed: int) -> None:
    model, card, on, total, target, batch, rank = drawn(seed)
    plan = planned(str(shortened(model, 3, tmp_path / model)), card, on, total, rank=rank, target=target, batch=batch)
    assert_as_planned(plan)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("target", [256, 1536])  # what the context takes is the most of a loss, or what the loss does
def test_a_context_is_gone_before_the_loss(tmp_path: Path, batch: int, target: int) -> None:
    on = with_attention({"lora", "mixed_precision", "gradient_checkpointing", "chunked_loss"}, "rtx4090", "qwen3-0.6b")
    source = str(shortened("qwen3-0.6b", 2, tmp_path / "model"))
    plan = planned(source, "rtx4090", on, 8192, target=target, batch=batch)
    found = assert_as_planned(plan)
    for phase in ("loss", "evaluate_loss"):
        assert predicted(plan)[phase] == pytest.approx(found.phases[phase], rel=CLOSE)


@pytest.mark.parametrize("model", MODELS)
def test_bytes_saved_for_one_more_layer(tmp_path: Path, model: str) -> None:
    """Two and three layers, all their tensors saved: their difference is what one layer saves."""
    on = with_attention({"lora", "mixed_precision", "chunked_loss"}, "rtx4090", model)
    total = at_most(2048, model)
    plans = [planned(str(shortened(model, n, tmp_path / str(n))), "rtx4090", on, total) for n in (2, 3)]
    (fewer, more), (less, greater) = (
        [counted(plan).phases["loss"] for plan in plans],
        [predicted(plan)["loss"] for plan in plans],
    )
    assert greater - less == pytest.approx(more - fewer, rel=CLOSE)


@pytest.mark.parametrize("model", ["llama-3.2-1b", "pythia-1b"])
@pytest.mark.parametrize("card", ["rtx2060s", "rtx4090"])  # float16 and bfloat16, of which CUDA's softmax makes others
@pytest.mark.parametrize("checkpointed", [True, False])
def test_stored_scores_phase_by_phase(tmp_path: Path, model: str, card: str, checkpointed: bool) -> None:
    """Forward pass and evaluation as well, which are never the peak."""
    on = {"lora", "mixed_precision", "chunked_loss"} | ({"gradient_checkpointing"} if checkpointed else set())
    plan = planned(str(shortened(model, 3, tmp_path / model)), card, on, at_most(2048, model))
    found, said = assert_as_planned(plan), predicted(plan)
    for phase in ("forward", "evaluate"):
        assert said[phase] == pytest.approx(found.phases[phase], rel=CLOSE), phase


@pytest.mark.parametrize(("model", "card"), [("phi-2", "gtx1080ti"), ("gemma-3-1b", "rtx2060s")])
@pytest.mark.parametrize("total", [512, 4096])
def test_four_bit_weights_in_float32(tmp_path: Path, model: str, card: str, total: int) -> None:
    """On Pascal, and where a model overflows float16 and a card has no bfloat16."""
    on = {"lora", "gradient_checkpointing", "chunked_loss", "exact_attention", "nf4_weights"}
    assert_as_planned(planned(str(shortened(model, 3, tmp_path / model)), card, on, total))


@pytest.mark.parametrize(("model", "total"), [("gemma-3-1b", 8192), ("starcoder2-3b", 12_288)])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_windows_much_shorter_than_the_sequence(tmp_path: Path, model: str, total: int, checkpointed: bool) -> None:
    on = {"lora", "mixed_precision", "chunked_loss", "exact_attention"}
    on |= {"gradient_checkpointing"} if checkpointed else set()
    window = load_model(model).sliding_window
    assert window is not None and window < total / 2
    assert_as_planned(planned(str(shortened(model, 3, tmp_path / model)), "rtx4090", on, total))


@pytest.mark.parametrize("model", MODELS[:5])
def test_full_depth(model: str) -> None:
    on = {"lora", "mixed_precision", "gradient_checkpointing", "chunked_loss", "nf4_weights"}
    assert_as_planned(planned(model, "rtx4090", with_attention(on, "rtx4090", model), 4096))

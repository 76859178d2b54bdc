"""The shipped cards: every number has a source, names are of one card, and what is not known is not guessed."""

import math
import re

import pytest
import yaml

from planner import hardware
from planner.cli import main
from planner.errors import PlanError
from planner.hardware import (
    FOLDERS_VARIABLE,
    SHIPPED,
    HardwareProfile,
    list_profiles,
    load_profile,
    squashed,
)
from planner.model import load_model
from planner.optimizations.base import Capability, Situation
from planner.planning import Request, make_plan

MIB = 2**20
IDS = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
CARDS = {name: load_profile(str(SHIPPED / f"{name}.yaml")) for name in IDS}
PLANNABLE = [name for name in IDS if CARDS[name].budget_bytes() is not None]
UNKNOWN = [name for name in IDS if CARDS[name].budget_bytes() is None]
AMD = [name for name in IDS if CARDS[name].vendor == "AMD"]


@pytest.fixture(autouse=True)
def _only_shipped_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDERS_VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_shipped_cards() -> None:
    assert [card.id for card in list_profiles()] == IDS
    assert {"a100-80gb-sxm", "h200-sxm", "rtx2060s", "rtx3060-12gb", "rtx3090", "rtx4090"} <= set(IDS)
    assert len(IDS) >= 57 and len(AMD) >= 3


@pytest.mark.parametrize("name", IDS)
def test_every_shipped_number_has_a_source_or_a_reason(name: str) -> None:
    card = CARDS[name]
    for fact in card.facts().values():
        assert fact.why and not fact.source if fact.value is None else len(fact.source) > 10
        assert not re.search(r"(?<![\w:/.])/\w", fact.source), "a path of somebody's machine"
    visible, context, memory = card.visible_bytes.value, card.context_bytes.value, card.memory_bytes.value
    assert memory is not None and set(card.rates) == {"fp32", "tf32", "fp16", "bf16"}
    for each in (card.bandwidth, card.pcie_bytes_per_second, card.sm_count, card.rates["fp32"]):
        assert each.value is not None
    if visible is not None:
        assert 0.9 * memory < visible < memory
    if visible is not None and context is not None:
        assert context < visible and card.budget_bytes() == visible - context


@pytest.mark.parametrize("name", IDS)
def test_a_shipped_file_is_canonical(name: str) -> None:
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert data["id"] == name == load_profile(name).id
    for key in ("compute_capability", "bf16", "flash_attention_2"):  # the facts that a profile keeps no source of
        assert data[key]["source"]
    assert max(map(len, text.splitlines())) <= 120 and "\t" not in text and text.endswith("\n")
    order = ["id", "name", "aliases", "vendor", "architecture", "compute_capability", "sm_count", "tdp", "memory"]
    order += ["visible_memory", "cuda_context", "memory_bandwidth", "pcie_bandwidth", "rates", "bf16"]
    assert list(data) in ([*order, "flash_attention_2"], [*order, "flash_attention_2", "notes"])


def test_no_name_is_of_two_cards() -> None:
    ids = {squashed(name): name for name in IDS}
    aliases: dict[str, str] = {}
    for card in CARDS.values():
        for alias in {squashed(alias) for alias in card.aliases}:
            assert ids.get(alias, card.id) == card.id, f"{card.id}: {alias} is an id"
            assert aliases.setdefault(alias, card.id) == card.id, f"{card.id}: {alias} is of {aliases[alias]}"
            others = [each.id for each in CARDS.values() if alias in hardware._names(each)]
            assert others == [card.id], alias
    twins = [card for card in CARDS.values() if [each.name for each in CARDS.values()].count(card.name) > 1]
    for card in twins:  # cards that print one name are told apart by their memory
        assert any("same name" in note for note in card.notes), card.id
        memories = [each.memory_bytes.value for each in twins if each.name == card.name]
        assert len(set(memories)) == len(memories)


@pytest.mark.parametrize("name", [name for name in IDS if name not in AMD])
def test_capabilities_agree_with_each_other(name: str) -> None:
    card = CARDS[name]
    assert card.compute_capability is not None and card.gfx == ""
    newer = card.compute_capability >= (8, 0)
    assert card.supports_bf16 == card.supports_flash_attention_2 == newer
    assert (card.rates["bf16"].value is not None) == (card.rates["tf32"].value is not None) == newer
    fp16, fp32 = card.rates["fp16"].value, card.rates["fp32"].value
    if card.compute_capability < (7, 0):
        assert fp16 is None and "no tensor cores" in card.rates["fp16"].why
    else:
        assert fp16 is not None and fp32 is not None and 1.9 < fp16 / fp32 < 29


def test_a_consumer_card_has_the_rate_with_fp32_accumulation() -> None:
    per_clock = {(7, 5): 512, (8, 6): 512, (8, 9): 512, (12, 0): 512}
    for card in CARDS.values():
        rate = card.rates["fp16"]
        if "GeForce RTX" in card.name and rate.basis == "derived":
            assert card.compute_capability is not None
            assert f" x {per_clock[card.compute_capability]} FLOP per clock" in rate.source
            assert "accumulating in FP32" in rate.source


@pytest.mark.parametrize("name", AMD)
def test_an_amd_card_has_no_compute_capability_and_what_needs_one_is_refused(name: str) -> None:
    card = CARDS[name]
    assert card.compute_capability is None and card.gfx.startswith("gfx")
    model = load_model("smollm2-135m")
    (reason,) = Capability((8, 0), "a test").reasons(Situation(card, model, 2**35))
    assert reason.startswith("needs ") and "≥ 8.0" in reason and card.name in reason


def test_the_reference_card() -> None:
    card = load_profile("rtx2060s")
    assert card.memory_bytes.value == 8 * 2**30
    assert card.visible_bytes.value == 7974 * MIB
    assert card.rates["fp16"].value == 28.7e12  # with FP32 accumulation, not the 57.4 without
    assert "Turing" in card.rates["bf16"].why
    assert card.bandwidth.value == 448e9
    assert card.pcie_bytes_per_second.value == 15.75e9
    assert card.context_bytes.basis == "assumed"
    assert "Not measured on this card" in card.context_bytes.source


@pytest.mark.parametrize("name", IDS)
def test_a_context_not_measured_on_the_card_says_so(name: str) -> None:
    context = CARDS[name].context_bytes
    if context.value is None:
        return
    assert context.basis in ("measured", "assumed")
    assert ("Not measured on this card" in context.source) == (context.basis == "assumed")


@pytest.mark.parametrize("name", sorted(set(PLANNABLE) - {"h200-sxm", "rtx3060-12gb", "rtx3090"}))
def test_an_assumed_context_follows_from_the_threads_of_the_card(name: str) -> None:
    threads_of = {(6, 1): 2048, (7, 0): 2048, (7, 5): 1024, (8, 0): 2048, (8, 6): 1536, (8, 9): 1536}
    threads_of |= {(9, 0): 2048, (10, 0): 2048, (12, 0): 1536}  # CUDA C++ programming guide, technical specifications
    card = CARDS[name]
    assert card.compute_capability is not None and card.sm_count.value is not None
    each = threads_of[card.compute_capability]
    share = card.sm_count.value * each / (132 * 2048)
    assert card.context_bytes.value == (621 if share <= 0.5 else math.ceil(828 * max(share, 1))) * MIB
    assert f"{card.sm_count.value} SMs of {each:,}" in " ".join(card.context_bytes.source.split())


def test_derived_rates_follow_from_their_source() -> None:
    for card in CARDS.values():
        for rate in card.rates.values():
            words = re.sub("[,;]", "", rate.source).replace("CUs", "SMs").split()  # AMD: compute units
            if rate.basis == "derived" and rate.value is not None:
                sms, per_clock, megahertz = (int(words[words.index(word) - 1]) for word in ("SMs", "FLOP", "MHz"))
                assert sms == card.sm_count.value
                assert rate.value == pytest.approx(sms * per_clock * megahertz * 1e6, rel=5e-3, abs=5e10)  # a tenth


# --- plans for them


@pytest.mark.parametrize("name", PLANNABLE)
def test_a_card_with_a_known_budget_makes_a_plan(name: str) -> None:
    card = CARDS[name]
    plan = make_plan(Request(gpu=name, model="smollm2-135m", total_tokens=1024))
    assert plan.verdict == "fits"
    assert (plan.gpu.id, plan.gpu.name) == (name, card.name)
    assert plan.memory.gpu.budget_bytes == card.budget_bytes()
    assert plan.memory.gpu.peak_bytes.high <= plan.memory.gpu.budget_bytes
    chosen = {choice.id: choice.knobs for choice in plan.choices}
    dtype = chosen.get("mixed_precision", {}).get("dtype", "float32")
    assert dtype != "bfloat16" or card.supports_bf16


def missing_facts(card: HardwareProfile) -> list[str]:
    return [name for name in ("visible_memory", "cuda_context") if card.facts()[name].value is None]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_card_without_a_budget_is_refused_with_the_missing_fact(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    card = CARDS[name]
    assert missing_facts(card)
    with pytest.raises(PlanError) as caught:
        make_plan(Request(gpu=name, model="smollm2-135m", total_tokens=1024))
    for fact in missing_facts(card):
        assert f"{fact}: {card.facts()[fact].why}" in str(caught.value)
    assert name in str(caught.value)
    assert main(["--gpu", name, "--model", "smollm2-135m", "--context", "1K"]) == 2
    printed = capsys.readouterr()
    assert all(fact in printed.err for fact in missing_facts(card)) and "Traceback" not in printed.err

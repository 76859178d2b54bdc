"""The search against a count of everything: each subset, each knob, one run at a time, in plain whole numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, product

import pytest
from cli_fixture import planned

from planner.calibration import calibration
from planner.compose import Configuration, compose, problems
from planner.errors import PlanError
from planner.evaluate import Limits
from planner.hardware import HardwareProfile, Sourced, load_profile
from planner.ledger import Basis, Device, Phase
from planner.longest import longest
from planner.machine import cpu_profile
from planner.model import load_model
from planner.on_card import SpaceOnCard
from planner.optimizations import all_optimizations
from planner.optimizations.base import Scalar, Situation
from planner.sets import valid_sets
from planner.solver import Objective, Search, Wanted, search
from planner.space import Space
from planner.timecost import step_time
from planner.units import GIB

MODELS = ("phi-2", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-1.7b", "smollm2-135m", "llama-3.1-8b", "mistral-7b-v0.3")
CARDS = ("rtx2060s", "rtx3060-12gb", "rtx4090", "h200-sxm", "cpu", "unrated")
STEP = 64  # tokens: how finely the longest sequence is told
Knobs = Mapping[str, Mapping[str, Scalar]]


@cache
def card(name: str) -> HardwareProfile:
    """A shipped card, a CPU of 12 GiB, a card whose rates nobody knows, or one whose link to the host nobody knows."""
    if name == "cpu":
        return replace(cpu_profile(), visible_bytes=Sourced(12 * GIB, "made for a test"))
    if name == "unrated":
        known, unknown = load_profile("rtx3090"), Sourced(None, "made for a test", "made for a test")
        return replace(known, rates=dict.fromkeys(known.rates, unknown), bandwidth=unknown)
    if name == "unlinked":
        return replace(load_profile("rtx3090"), pcie_bytes_per_second=Sourced(None, "made for a test", "for a test"))
    return load_profile(name)


@dataclass(frozen=True)
class Asked:
    """What a search is given."""

    situation: Situation
    limits: Limits
    wanted: tuple[Wanted, ...] = (Wanted(None, 64, 64, 8),)
    objective: Objective = "context"
    required: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    knobs: Knobs | None = None
    batch: int = 1

    def search(self) -> Search:
        """What the planner finds."""
        given = {wish: getattr(self, wish) for wish in ("objective", "required", "excluded", "knobs", "batch")}
        return search(self.situation, self.limits, calibration(), self.wanted, **given)


@dataclass(frozen=True)
class Weighed:
    """One configuration at one length, in plain numbers."""

    configuration: Configuration
    low: int
    expected: int
    high: int
    host: int
    pinned: int
    disk: int
    seconds: float
    excess: float  # the largest share it takes of any limit
    fits: bool

    def cost(self, objective: Objective) -> tuple[float, ...]:
        """What it is chosen by: three digits of its time, how much it changes the result, its memory."""
        time, known = float(f"{self.seconds:.3g}"), all_optimizations()
        inexact = sum(known[name].harm for name in self.configuration.ids if not known[name].exact)
        return (self.high, time, inexact) if objective == "memory" else (time, inexact, self.high)


NF4 = "nf4_weights"
"""The one optimisation that has to be worth it where a plan is for the longest context."""


def asked_of(profile: HardwareProfile, model: str, host_bytes: int = 32 * GIB, seconds: float = 86_400.0) -> Asked:
    """A search with the card's own memory and nothing pinned."""
    budget = profile.budget_bytes()
    assert budget is not None
    host = budget if profile.kind == "cpu" else host_bytes
    return Asked(Situation(profile, load_model(model), host), Limits(budget, host, seconds))


def knob_values(
    ids: Sequence[str], situation: Situation, pinned: Knobs, every_name: bool
) -> Iterator[dict[str, dict[str, Scalar]]]:
    """Every combination of the knobs' choices, the first choices first; the rank is the run's own.

    A knob without a letter is a choice by name; unless ``every_name``, its first is taken.
    """
    inside = replace(situation, chosen=frozenset(ids))
    axes: list[list[tuple[str, str, Scalar]]] = []
    for name in ids:
        for knob in all_optimizations()[name].knobs:
            choices, fixed = knob.choices(inside), pinned.get(name, {}).get(knob.name)
            if fixed is not None:
                choices = (fixed,) if knob.may_be(fixed, inside) else ()
            elif knob.letter == "R" or not (knob.letter or every_name):
                choices = choices[:1]
            axes.append([(name, knob.name, value) for value in choices])
    for combination in product(*axes):
        values: dict[str, dict[str, Scalar]] = {name: {} for name in ids}
        for name, knob_name, value in combination:
            values[name][knob_name] = value
        yield values


def everything(asked: Asked, *, every_name: bool = False) -> list[Configuration]:
    """Each valid subset of all optimisations that trains something, with each choice of each knob."""
    by_request = {name for name, each in all_optimizations().items() if each.asked or each.last_resort}
    # What the card or the model does not allow is in no valid set, whatever else is.
    names = sorted(
        name
        for name, each in all_optimizations().items()
        if name not in {*asked.required, *asked.excluded, *by_request} and not each.reasons(asked.situation)
    )
    subsets = chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))
    return [
        compose(ids, values, asked.situation)
        for ids in (tuple(sorted({*asked.required, *subset})) for subset in subsets)
        if not {*asked.required} & {*asked.excluded}
        if any("adapters/weights" in all_optimizations()[name].makes for name in ids)
        if not problems(ids, asked.situation)
        for values in knob_values(ids, asked.situation, asked.knobs or {}, every_name)
    ]


def weigh(configuration: Configuration, asked: Asked, want: Wanted) -> Weighed:
    """Bytes and seconds of one configuration at one length, by adding up the ledger phase by phase."""
    gpu, limits, constants = asked.situation.gpu, asked.limits, calibration()
    workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
    run = {"batch": asked.batch, "total": want.total, "target": want.target, "rank": want.rank}
    letters = configuration.at(**run, workspace=workspace)
    ledger = configuration.ledger
    by_phase = ledger.by_phase(letters, Device)
    phases = by_phase.values()

    def peak(*devices: Device, bases: Sequence[Basis] = tuple(Basis)) -> int:
        counted = {name for name, term in ledger.terms.items() if term.device in devices and term.basis in bases}
        return max(sum(size for name, size in terms.items() if name in counted) for terms in phases)

    expected = peak(Device.GPU)
    assert type(expected) is int
    high = expected + int(constants.reserve_bytes(expected, gpu.kind))
    host = peak(Device.HOST, Device.PINNED) + constants.host_process_bytes(gpu.kind)
    host += high if gpu.kind == "cpu" else 0
    amounts = {work.name: work.amount(letters) for work in ledger.work.values()}
    time = step_time(configuration, amounts, gpu, constants)
    late = 0.0 if time.estimate is None else time.estimate * limits.accumulation / limits.step_seconds
    disk = sum(size for name, size in by_phase[Phase.BACKWARD].items() if ledger.terms[name].device is Device.DISK)
    shares = (high / max(1, limits.gpu_bytes), host / max(1, limits.host_bytes), disk / max(1, limits.disk_bytes), late)
    seconds, low, pinned = time.rank * limits.accumulation, peak(Device.GPU, bases=(Basis.EXACT,)), peak(Device.PINNED)
    return Weighed(configuration, low, expected, high, host, pinned, disk, seconds, max(shares), max(shares) <= 1)


def key(configuration: Configuration) -> str:
    return json.dumps([configuration.ids, configuration.knobs], sort_keys=True)


def asked_at_random(seed: int) -> Asked:
    """A card, a model, limits and wishes, some of them hard to meet; the same for the same seed."""
    source = random.Random(seed)
    asked = asked_of(card(CARDS[seed % len(CARDS)]), source.choice(MODELS))
    situation, memory = asked.situation, asked.limits.gpu_bytes
    if source.random() < 0.5:
        memory = min(memory, int(source.uniform(0.5, 12) * GIB))
    host = memory if situation.gpu.kind == "cpu" else int(2 ** source.uniform(0.5, 7) * GIB)
    seconds = 86_400.0 if source.random() < 0.5 else 10 ** source.uniform(-1, 3)
    names = [name for name in all_optimizations() if name != "lora"]
    excluded = source.sample(names, source.choice((0, 1, 2, 3, 4)))
    left = [name for name in names if name not in excluded and not all_optimizations()[name].reasons(situation)]
    totals = sorted(int(2 ** source.uniform(1, 17)) for _ in range(3))
    asked = Asked(
        replace(situation, host_bytes=host),
        Limits(memory, host, seconds, source.choice((1, 1, 4))),
        tuple(Wanted(None, size, source.choice((size, size // 2)), source.choice((2, 48))) for size in totals),
        source.choice(("context", "speed", "memory")),
        tuple(source.sample(left, min(len(left), source.choice((0, 0, 1, 2))))),
        tuple(excluded),
        {"chunked_loss": {"rows": 300}} if source.random() < 0.2 and "chunked_loss" not in excluded else {},
        source.choice((1, 1, 3)),
    )
    return with_few_knobs(asked, random.Random(f"knobs {seed}"))


DIALS = (
    ("streamed", "chunk", (8192, 4096, 2048, 300)),
    ("streamed", "heads", (8, 4, 2, 1)),
    ("checkpoint_spacing", "every", (2, 3, 5)),
    ("chunked_loss", "rows", (1024, 4096, 300)),
)


def with_few_knobs(asked: Asked, source: random.Random) -> Asked:
    """The same with all but one of the executor's knobs pinned, or without it: more take too long to count one by one.

    All values of all its knobs make 30,000 configurations; each is weighed here in plain Python.
    """
    sets = list(valid_sets(asked.situation, asked.required, asked.excluded))
    if not any("streamed" in ids for ids in sets):
        return asked
    if "streamed" not in asked.required and source.random() < 0.4:
        return replace(asked, excluded=(*asked.excluded, "streamed"))
    knobs = {owner: dict(values) for owner, values in (asked.knobs or {}).items()}
    free = source.choice(DIALS)
    for owner, name, values in DIALS:
        if any(owner in ids for ids in sets) and (owner, name) != free[:2]:
            knobs.setdefault(owner, {}).setdefault(name, source.choice(values))
    return replace(asked, knobs=knobs)


@pytest.mark.parametrize("seed", [*range(26), 35, 50, 59, 85])  # the last tell a wrong tie-break
def test_the_search_finds_what_counting_everything_finds(seed: int) -> None:
    found_as_counted(asked_at_random(seed))


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_it_where_some_times_are_unknown(seed: int) -> None:
    asked = asked_at_random(6 * seed + 2)
    found_as_counted(replace(asked, situation=replace(asked.situation, gpu=card("unlinked"))))


@pytest.mark.parametrize("seed", range(7))
def test_a_disk_is_a_limit_like_the_others(seed: int) -> None:
    """Long sequences and little host memory, so that the size of the disk decides."""
    source = random.Random(seed)
    asked = asked_of(card(("rtx2060s", "rtx4090", "unlinked")[seed % 3]), source.choice(("phi-2", "llama-3.2-1b")))
    disk, host = int(2 ** source.uniform(0, 6) * GIB), int(2 ** source.uniform(2, 5) * GIB)
    situation = replace(asked.situation, disk_bytes=disk, host_bytes=host)
    lengths = tuple(Wanted(None, size, 512, 4) for size in sorted(int(2 ** source.uniform(14, 20)) for _ in range(4)))
    limits = replace(asked.limits, disk_bytes=disk, host_bytes=host, step_seconds=10 ** source.uniform(2, 6))
    objective: Objective = source.choice(("context", "speed", "memory"))
    required = ("streamed", "checkpoint_disk") if seed % 4 == 3 else ("streamed",)
    asked = Asked(situation, limits, lengths, objective, required, ("adamw_8bit", "weight_averaging"))
    found_as_counted(with_few_knobs(asked, random.Random(f"disk {seed}")))


def found_as_counted(asked: Asked) -> None:
    configurations = everything(asked)
    if not configurations:
        with pytest.raises(PlanError, match="no valid set of optimisations is left"):
            asked.search()
        return
    found = asked.search()
    weighed = [[weigh(one, asked, want) for one in configurations] for want in asked.wanted]
    by_key = {key(one): number for number, one in enumerate(configurations)}
    for outcome in found.outcomes:
        for index, at in enumerate(weighed):
            one = at[by_key[key(outcome.configuration)]]
            of = ("low", "expected", "high", "host", "pinned", "disk", "fits")
            arrays, plain = ([getattr(each, name) for name in of] for each in (outcome, one))
            assert [int(each[index]) for each in arrays] == plain, "numpy adds up as Python does"
            assert float(outcome.time.rank[index]) == pytest.approx(one.seconds, rel=1e-12)
    reached = [any(one.fits for one in at) for at in weighed]
    assert [any(bool(outcome.fits[i]) for outcome in found.outcomes) for i in range(len(reached))] == reached
    assert found.index == max((i for i, any_fits in enumerate(reached) if any_fits), default=0)
    at, best = weighed[found.index], weighed[found.index][by_key[key(found.best.configuration)]]
    if not any(reached):
        assert best.excess == min(one.excess for one in at), "what comes nearest"
        return
    fitting = [one for one in at if one.fits]
    least = min(one.cost(asked.objective) for one in fitting)
    if asked.objective == "context" and any(
        one.cost("context") == least and NF4 in one.configuration.ids for one in fitting
    ):
        without = [one for one in fitting if NF4 not in one.configuration.ids]
        gentlest = min((one.cost("context") for one in without), default=None)
        if gentlest is not None and gentlest[0] <= all_optimizations()[NF4].worth * least[0]:
            fitting, least = without, gentlest
    if asked.objective == "memory":
        assert best.cost("memory") == least
        return
    # Knobs are ordered best first: of the cheapest set, the first choices that fit and cost no more.
    cheapest = {one.configuration.ids for one in fitting if one.cost(asked.objective) == least}
    no_dearer = [one for one in fitting if one.cost(asked.objective)[:2] == least[:2]]
    assert best in [next(one for one in no_dearer if one.configuration.ids == ids) for ids in cheapest]


@pytest.mark.parametrize("name", ["rtx2060s", "rtx3060-12gb", "rtx4090", "a100-80gb-sxm", "h200-sxm"])
def test_no_choice_by_name_is_better_than_the_first(name: str) -> None:
    """The search takes the first of them unseen, so no other may be faster by the planner's own estimate."""
    asked, want = asked_of(card(name), "phi-2"), Wanted(None, 8192, 8192, 8)
    asked = replace(asked, required=("chunked_loss", "mixed_precision"))
    asked = replace(asked, knobs={"streamed": {"chunk": 8192, "heads": 8}, "checkpoint_spacing": {"every": 2}})
    first, every = (
        min(one.cost("speed") for one in (weigh(each, asked, want) for each in tried) if one.fits)
        for tried in (everything(asked), everything(asked, every_name=True))
    )
    assert first == every


@pytest.mark.parametrize(("name", "model"), [("rtx2060s", "phi-2"), ("cpu", "phi-2"), ("h200-sxm", "qwen3-1.7b")])
def test_a_set_without_a_free_optimisation_is_never_better(name: str, model: str) -> None:
    asked, known = asked_of(card(name), model), all_optimizations()

    def names(one: str) -> frozenset[str]:
        return known[one].claims | known[one].makes

    usable = [one for one in known if not known[one].reasons(asked.situation)]
    free = [one for one in usable if known[one].free and not any(names(one) & names(o) for o in usable if o != one)]
    assert "chunked_loss" in free and ("fused_activation" in free) is (model == "phi-2")
    wanted = [Wanted(None, total, target, 8) for total, target in ((2, 1), (700, 700), (90_000, 512))]
    for configuration in everything(with_few_knobs(asked, random.Random(2))):
        for one in {*free} - {*configuration.ids}:
            more = (*configuration.ids, one)
            assert not problems(more, asked.situation)
            with_it = compose(more, configuration.knobs, asked.situation)
            for want in wanted:
                before, after = weigh(configuration, asked, want), weigh(with_it, asked, want)
                assert after.high <= before.high and after.host <= before.host
                assert after.seconds <= before.seconds


@pytest.mark.parametrize(
    ("name", "model", "host", "seconds", "target"),
    [
        ("rtx2060s", "phi-2", 32, 86_400.0, None),
        ("rtx2060s", "llama-3.2-1b", 4, 86_400.0, 512),
        ("rtx3060-12gb", "llama-3.1-8b", 16, 86_400.0, None),
        ("rtx4090", "phi-2", 64, 30.0, 512),
        ("h200-sxm", "qwen3-1.7b", 32, 86_400.0, 2048),
        ("cpu", "smollm2-135m", 0, 86_400.0, None),
        ("cpu", "qwen2.5-0.5b", 0, 86_400.0, 100),
        ("unrated", "mistral-7b-v0.3", 32, 1.0, None),
    ],
)
def test_the_longest_is_exact(name: str, model: str, host: int, seconds: float, target: int | None) -> None:
    asked = with_few_knobs(asked_of(card(name), model, host * GIB, seconds), random.Random(model))
    configurations = everything(asked)
    space = SpaceOnCard(Space.of(configurations, asked.situation), asked.situation.gpu, calibration(), 1)
    found = longest(space, asked.limits, rank=8, target=target)
    searched = replace(asked, wanted=(Wanted(None, 1024, target or 1024, 8),)).search()
    assert found == (searched.longest_all_trained if target is None else searched.longest_with_target)
    assert found is not None and found % STEP == 0

    def anything_fits(total: int) -> bool:
        want = Wanted(None, total, total if target is None else min(target, total), 8)
        return any(weigh(one, asked, want).fits for one in configurations)

    assert anything_fits(found)
    assert not any(anything_fits(found + more) for more in (STEP, 9 * STEP, 8 * found))


@pytest.mark.parametrize(
    ("gpu", "model", "length"),
    [("rtx2060s", "phi-2", "900"), ("h200-sxm", "llama-3.1-8b", "4K"), ("cpu", "smollm2-135m", "1K")],
)
def test_each_objective_is_best_at_what_it_is_for(gpu: str, model: str, length: str) -> None:
    words = f"--gpu {gpu} --model {model} --context {length}"
    plans = {each: planned(f"{words} --objective {each}") for each in ("context", "speed", "memory")}
    assert {plan.verdict for plan in plans.values()} == {"fits"}
    peaks = {each: plan.memory.gpu.peak_bytes.high for each, plan in plans.items()}
    assert peaks["memory"] == min(peaks.values()) < peaks["speed"]
    times = {each: float(f"{plan.time.step_seconds.estimate or 0:.3g}") for each, plan in plans.items()}
    assert times["speed"] == min(times.values()), "three digits of the time count"

"""Models, machines and sets of optimisations that nobody chose by hand, for tests of properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from planner.activations import ACTIVATIONS
from planner.compose import Configuration, compose, problems
from planner.hardware import list_profiles, load_profile
from planner.ledger import Device, Phase
from planner.machine import cpu_profile
from planner.model import ModelShape, list_models, load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.symbols import Letters

NAMES = sorted(all_optimizations())
# One card of each generation: what can be on, and so which formulas there are, follows from nothing else.
CARDS = (cpu_profile(), *list_profiles(), load_profile("rtx2060s"))
GENERATIONS = {(card.compute_capability, card.supports_bf16): card for card in CARDS}
MACHINES = {card.id: card for card in GENERATIONS.values()}
SHIPPED = [load_model(facts.id) for facts in list_models()]
PATTERNS = [load_model("phi-2"), load_model("llama-3.2-1b")]


def examples(count: int) -> settings:
    """So many examples, however long each takes, and however many a test passes over."""
    return settings(deadline=None, max_examples=count, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Drawn:
    """A run of a model on a machine with optimisations switched on."""

    model: ModelShape
    machine: str
    ids: tuple[str, ...]
    knobs: Mapping[str, Mapping[str, Any]]
    batch: int
    total: int
    target: int

    @property
    def situation(self) -> Situation:
        return Situation(MACHINES[self.machine], self.model, 2**35, merge=True, disk_bytes=2**45)

    @property
    def configuration(self) -> Configuration:
        return compose(self.ids, self.knobs, self.situation)

    @property
    def letters(self) -> Letters:
        at = self.configuration.at(batch=self.batch, total=self.total, target=self.target, workspace=8_519_680)
        return Letters(**{"C": 1, **vars(at)})  # no slice where there is no chunked loss

    def phases(self, device: Device) -> dict[Phase, int]:
        by_phase = self.configuration.ledger.by_phase(self.letters, (device,))
        return {phase: sum(terms.values()) for phase, terms in by_phase.items()}


@st.composite
def random_models(draw: st.DrawFn) -> ModelShape:
    """A decoder of any sizes with everything that follows from them, in the manner of Phi or of Llama."""
    like = draw(st.sampled_from(PATTERNS))
    kv_heads, head_size = draw(st.integers(1, 8)), 8 * draw(st.integers(1, 32))
    heads = kv_heads * draw(st.integers(1, 8))
    model = replace(
        like,
        layers=draw(st.integers(1, 48)),
        mlp_width=draw(st.integers(8, 16_384)),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        rotary_width=head_size // 2 if like.rotary_width < like.head_size else head_size,
        vocab=draw(st.integers(32, 200_000)),
        activation=draw(st.sampled_from(["gelu_new", "silu", *sorted(ACTIVATIONS)])),
        tied_head=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, None, None, 512])),
    )
    return of_width(model, heads * draw(st.sampled_from([8, head_size, 128])))


def of_width(model: ModelShape, width: int) -> ModelShape:
    """The model with a residual stream of another width, its heads and its MLP as they are."""
    vectors = 2 if model.norm == "layernorm" else 1
    query, kv, mlp = model.query_width, model.kv_width, model.mlp_width
    attention = [(width, query), (width, kv), (width, kv), (query, width)]
    upward = [(width, mlp)] * (len(model.linears) - 5)
    sizes = zip(model.linears, [*attention, *upward, (mlp, width)], strict=True)
    return replace(
        model,
        width=width,
        linears=tuple(replace(linear, inputs=inputs, outputs=outputs) for linear, (inputs, outputs) in sizes),
        norm_parameters_per_layer=vectors * (model.norms_per_layer * width + 2 * model.qk_norm * model.head_size),
        final_norm_parameters=vectors * width,
    )


def in_proportion(model: ModelShape, times: int) -> ModelShape:
    """The model as many times as wide, with so many times the heads and the width of the MLP."""
    wide = [replace(x, inputs=x.inputs * times, outputs=x.outputs * times) for x in model.linears]
    names = ("width", "mlp_width", "heads", "kv_heads", "norm_parameters_per_layer", "final_norm_parameters")
    return replace(model, linears=tuple(wide), **{name: getattr(model, name) * times for name in names})


def repaired(ids: set[str], situation: Situation, *, passes: bool = False) -> tuple[str, ...]:
    """The set without what cannot be on in it; of those that do the same, the first stays.

    Args:
        passes: whether layers run in passes where they can, or whole.
    """
    taken: set[str] = set()
    usable = sorted(name for name in ids if not all_optimizations()[name].reasons(situation))
    ids = set()
    for name in sorted(usable, key=lambda name: (name == "streamed") is not passes):
        names = all_optimizations()[name].claims | all_optimizations()[name].makes
        if not names & taken:
            taken |= names
            ids.add(name)
    while found := problems(ids, situation):
        ids = ids - set(found)
    return tuple(sorted(ids))


@st.composite
def drawn(draw: st.DrawFn, name: str | None = None, on: frozenset[str] = frozenset(), off: str = "") -> Drawn:
    """Everything is on but what is switched off here, and what cannot be on.

    Args:
        name: an optimisation that the run is for: on a machine and, among those shipped, for a model that can have it,
            with nothing on that does the same.
        on: what is on as well.
        off: what is not, words apart.
    """
    items, machines = all_optimizations(), sorted(MACHINES)
    kept = {"lora", *on, *([name] if name else [])}
    apart = set(off.split())
    if name:
        can = {each: [model for model in SHIPPED if able(kept, each, model)] for each in machines}
        machines = [each for each in machines if can[each]]
        apart |= {each for each in items if items[each].claims & items[name].claims} - kept
    machine = draw(st.sampled_from(machines))
    shipped = can[machine] if name else SHIPPED
    model = draw(st.sampled_from(shipped) | random_models())
    situation = Situation(MACHINES[machine], model, 2**35, merge=True, disk_bytes=2**45)
    apart |= draw(st.sets(st.sampled_from([each for each in NAMES if each not in kept])))
    passes = draw(st.booleans()) if "streamed" not in kept else True
    ids = repaired(set(NAMES) - apart, situation, passes=passes)
    assume("lora" in ids)  # some models need a newer card
    situation = replace(situation, chosen=frozenset(ids))
    knobs: dict[str, dict[str, Any]] = {}
    for each in ids:
        for knob in items[each].knobs:
            values = st.sampled_from(knob.choices(situation))
            if knob.low is not None and knob.high is not None:
                numbers = st.integers(int(knob.low), min(int(knob.high), 4096))
                values |= numbers if knob.whole else st.floats(knob.low, knob.high)
            knobs.setdefault(each, {})[knob.name] = draw(values)
    total = draw(st.integers(1, 2**17))
    return Drawn(model, machine, ids, knobs, draw(st.integers(1, 8)), total, draw(st.integers(1, total)))


def able(ids: set[str], machine: str, model: ModelShape) -> bool:
    """Whether nothing about machine and model speaks against any of these."""
    situation = Situation(MACHINES[machine], model, 2**35, merge=True, disk_bytes=2**45)
    return not any(all_optimizations()[each].reasons(situation) for each in ids)

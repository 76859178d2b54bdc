"""Puts a set of optimisations together: is it valid, why not, and what ledger, letters and settings it gives.

Validity follows from names alone: an attribute is claimed once, a claimed term must exist, a needed term must be
made. There is no table of pairs. ``term.attribute`` names an attribute of a term, ``work.amount`` the amount of a
piece of work; what a rewrite changes without having claimed it is an error of ours, and found at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from planner.activations import expert_tensors, mlp_tensors
from planner.adapter_matrices import adapter_letters
from planner.baseline import baseline
from planner.ledger import ATTRIBUTES, Ledger
from planner.model import ModelShape
from planner.optimizations import all_optimizations
from planner.optimizations.base import Knobs, Needs, Optimization, Scalar, Situation
from planner.symbols import Letters, Number


def model_letters(model: ModelShape) -> dict[str, int]:
    """The letters a model gives values to."""
    if model.experts:
        saved, alive = expert_tensors(model.activation, clamped=model.clamped_experts)
        saved, alive = saved * model.experts_per_token, alive * model.experts_per_token
    else:
        saved, alive = mlp_tensors(model.activation, gated=model.gated_mlp, fused=model.fused_gate_up)
    return {
        "L": model.layers,
        "D": model.width,
        "F": model.mlp_width,
        "H": model.heads,
        "K": model.kv_heads,
        "E": model.head_size,
        "O": model.rotary_tables * model.rotary_width + int(model.rope_type == "longrope") * model.rotary_width // 2,
        "o": model.rotary_tables * model.rotary_table_width,
        "V": model.vocab,
        "P": model.linear_parameters_per_layer,
        "N": model.small_parameters,
        "M": model.largest_linear,
        "J": len(model.linears),
        "n": model.norms_per_layer,
        "m": model.norms_per_layer - model.output_norms_per_layer - int(model.experts > 0),
        "z": model.output_norms_per_layer,
        "j_r": int(model.residual_multiplier is not None),
        "X": model.experts,
        "d": model.experts_per_token,
        "j": model.router_parameters_per_layer + model.expert_bias_parameters_per_layer,
        "b": int(model.clamped_experts),
        "y": int(model.wide_expert_weights),
        "i": 0 if model.parallel_block else model.norms_per_layer - 1,
        "k": 1 + int(0 < model.sliding_layers < model.layers),
        "r": model.native_context if model.learned_positions else 0,
        "u": int(model.narrow_softmax),
        "l": model.sliding_layers,
        "c": int(model.attention_softcap is not None),
        "t": int(model.final_softcap is not None),
        "s": model.sliding_window or model.native_context,
        # Where nothing turns them, query and key are no tensors of their own.
        "v": int(model.fused_qkv and not model.learned_positions) * (model.heads + model.kv_heads) * model.head_size,
        "Q": int(model.norm == "rmsnorm"),
        "n_s": 2 if model.norm == "layernorm" else 1,
        "q": int(model.qk_norm),
        "f": saved,
        "g": alive,
        "Y": int(not model.tied_head),
        "U": model.adapted_width(),
        "I": len(model.linears),
    }


TRAIN_SCHEDULE = "train.schedule"
"""The setting ``schedule`` where no optimisation is the schedule of the learning rate."""
TRAIN_RATE = "train.lr"
"""The setting ``rate`` where no optimisation has the highest learning rate."""
WHOLE_ROWS = "documents"
"""The setting ``rows`` where no optimisation says what shares a row, or how a row is cut."""
TRAIN_CLIPPING = "train.max_grad_norm"
"""The setting ``clipping`` where no optimisation clips the gradients."""


@dataclass(frozen=True)
class Configuration:
    """A valid set of optimisations with values for their knobs, and what follows from it.

    ``letters`` lacks only those of the run (B, S, T) and of the machine (Z).
    """

    ids: tuple[str, ...]
    knobs: Mapping[str, Knobs]
    ledger: Ledger
    letters: Mapping[str, int]
    settings: Mapping[str, str]
    model: ModelShape

    def at(
        self, *, batch: object, total: object, target: object, workspace: int, rank: Number | None = None
    ) -> Letters:
        """All letters for a run, numbers or numpy arrays of them; the rank is its own, where one is given."""
        ranked = {} if rank is None else adapter_letters(self.model, rank)
        return Letters(**{**self.letters, **ranked, "B": batch, "S": total, "T": target, "Z": workspace})


def problems(ids: Iterable[str], situation: Situation) -> dict[str, tuple[str, ...]]:
    """Why the set is not valid: for each optimisation that cannot be on, the reasons. Empty where it is valid."""
    known = all_optimizations()
    names = frozenset(ids)
    situation = situation.choosing(names)
    chosen = [known[name] for name in sorted(names)]
    nothing_on = _nothing_on()
    existing = {*nothing_on.terms, *nothing_on.work, *(name for each in chosen for name in each.makes | each.adds)}
    claimed_by: dict[str, list[str]] = defaultdict(list)
    made_by: dict[str, list[str]] = defaultdict(list)
    for choice in chosen:
        for claim in choice.claims:
            claimed_by[claim].append(choice.id)
        for term in choice.makes:
            made_by[term].append(choice.id)
    found: dict[str, list[str]] = defaultdict(list)
    for choice in chosen:
        found[choice.id] += choice.reasons(situation)
        for claim in sorted(choice.claims):
            others = [other for other in claimed_by[claim] if other != choice.id]
            found[choice.id] += [f"{claim} is already claimed by {other}" for other in others]
            term = claim.rpartition(".")[0]
            if "/" in claim and term not in existing:
                found[choice.id].append(f"nothing here makes {term}; {_makers(term, choice, known)}")
        for term in sorted(choice.makes):
            found[choice.id] += [f"{term} is already made by {other}" for other in made_by[term] if other != choice.id]
        for need in choice.requires:
            if isinstance(need, Needs) and need.term not in existing:
                found[choice.id].append(
                    f"{need.because}, and nothing here makes {need.term}; {_makers(need.term, choice, known)}"
                )
    return {name: tuple(dict.fromkeys(reasons)) for name, reasons in found.items() if reasons}


@dataclass(frozen=True)
class Standing:
    """What a valid set claims, makes and has, so that it is seen at a glance what can be put on top of it.

    It asks nothing again of those that are in the set: who asks for another by name is known (``planner.branches``).
    """

    ids: tuple[str, ...]
    taken: frozenset[str]  # claims, and names that are made
    existing: frozenset[str]

    @classmethod
    def of_nothing(cls) -> Standing:
        """Where nothing is on."""
        return cls((), frozenset(), frozenset({*_nothing_on().terms, *_nothing_on().work}))

    def with_more(self, ids: Iterable[str]) -> Standing:
        """The set with more on top, which it bears."""
        known, more = all_optimizations(), tuple(ids)
        return Standing(
            (*self.ids, *more),
            self.taken.union(*(known[name].claims | known[name].makes for name in more)),
            self.existing.union(*(known[name].makes | known[name].adds for name in more)),
        )

    def bears(self, ids: Sequence[str], situation: Situation) -> bool:
        """Whether the set is valid with these on top; as ``problems`` says it, without the reasons."""
        known = all_optimizations()
        chosen = [known[name] for name in ids]
        claimed = [name for each in chosen for name in (*each.claims, *each.makes)]
        if len({*claimed}) < len(claimed) or not self.taken.isdisjoint(claimed):
            return False
        needed = {term for each in chosen for claim in each.claims if (term := _term(claim))}
        needed |= {need.term for each in chosen for need in each.requires if isinstance(need, Needs)}
        if not needed <= self.existing.union(*(each.makes | each.adds for each in chosen)):
            return False
        inside = situation.choosing((*self.ids, *ids))
        return not any(each.reasons(inside) for each in chosen)


def _makers(term: str, asking: Optimization, known: Mapping[str, Optimization]) -> str:
    """Which of them make a term, but for those that cannot stand beside the one that asks for it."""
    makers = [name for name, each in known.items() if term in each.makes and not each.claims & asking.claims]
    return f"{' or '.join(makers)} does" if makers else "no optimisation does"


@cache
def _nothing_on() -> Ledger:
    return baseline()


def compose(
    ids: Iterable[str],
    knobs: Mapping[str, Mapping[str, Scalar]],
    situation: Situation,
    onto: Configuration | None = None,
) -> Configuration:
    """The configuration of a valid set; knobs that are not given take their best choice.

    Optimisations are applied makers first; beyond that the order does not matter, since nothing is claimed twice.

    Args:
        onto: the configuration of a part of the set; the rest is put on top of it.
    """
    known = all_optimizations()
    names = frozenset(ids)
    situation = situation.choosing(names)
    if onto is None:
        letters = model_letters(situation.model) | _claimed_letters(situation)
        settings = {"dtype": "fp32", "attention": "eager", "executor": "resident"}
        settings |= {"rate": TRAIN_RATE, "schedule": TRAIN_SCHEDULE}
        settings |= {"clipping": TRAIN_CLIPPING, "rows": WHOLE_ROWS}
        onto = Configuration((), {}, _nothing_on(), letters, settings, situation.model)
    ledger, letters = onto.ledger, dict(onto.letters)
    settings, complete = dict(onto.settings), dict(onto.knobs)
    made = {*ledger.terms, *ledger.work}
    waiting = [known[name] for name in sorted(names.difference(onto.ids))]
    while waiting:
        ready = next((c for c in waiting if {_term(claim) for claim in c.claims} - {""} <= made | c.makes), None)
        assert ready is not None, f"compose an invalid set: {[c.id for c in waiting]}"
        waiting.remove(ready)
        given = knobs.get(ready.id, {})
        values = {
            knob.name: given[knob.name] if knob.name in given else knob.choices(situation)[0] for knob in ready.knobs
        }
        before = ledger
        ledger = ready.rewrite(ledger, values, situation)
        assert set(ledger.terms) - set(before.terms) == set(ready.makes), f"{ready.id} makes other terms than it says"
        assert set(ledger.work) - set(before.work) == set(ready.adds), f"{ready.id} adds other work than it says"
        assert _changed(before, ledger) <= ready.claims, f"{ready.id} changes more than it claims"
        made = {*ledger.terms, *ledger.work}
        letters |= ready.letters(situation, values)
        settings |= ready.settings(situation, values)
        complete[ready.id] = values
    ordered = tuple(sorted(names))
    return Configuration(
        ordered, {name: complete[name] for name in ordered}, ledger, letters, settings, situation.model
    )


# What streaming goes by where nothing streams: the whole sequence and all heads at once, every layer input as it is.
STREAMING = {"S_c": 2**40, "H_g": 2**20, "S_b": 2**40, "j_h": 0, "l_r": 0, "L_s": 1, "b_c": 0, "k_a": 0}


def _claimed_letters(situation: Situation) -> dict[str, int]:
    """The letters that optimisations claim, before any does; how weights come in from a GGUF file; whether to merge."""
    gguf = int(situation.model.quantized == "gguf")
    staged = gguf * int(situation.gpu.kind == "gpu")
    baseline_values = {"a": 32, "w": 32, "h": 0, "e": 1, "A": situation.model.layers, "p": 0, "d_r": 1, "k_c": 0}
    return baseline_values | STREAMING | {"G": gguf, "W": staged, "W_m": int(situation.merge)}


def _changed(before: Ledger, after: Ledger) -> set[str]:
    """The attributes of terms and amounts of work that are not what they were, as claims name them."""
    terms = {
        f"{name}.{attribute}"
        for name, term in before.terms.items()
        if after.terms[name] is not term
        for attribute in ATTRIBUTES
        if getattr(after.terms[name], attribute) != getattr(term, attribute)
    }
    return terms | {
        f"{name}.{attribute}"
        for name, work in before.work.items()
        if after.work[name] is not work
        for attribute in ("amount", "resource", "phase")
        if getattr(after.work[name], attribute) != getattr(work, attribute)
    }


def _term(claim: str) -> str:
    return claim.rpartition(".")[0] if "/" in claim else ""

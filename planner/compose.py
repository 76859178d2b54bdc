"""Puts a set of optimisations together: is it valid, why not, and what ledger, letters and settings it gives.

Validity follows from names alone: an attribute is claimed once, a claimed term must exist, a needed term must be
made. There is no table of pairs. ``term.attribute`` names an attribute of a term, ``work.amount`` the amount of a
piece of work; what a rewrite changes without having claimed it is an error of ours, and found at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from planner.activations import mlp_tensors
from planner.baseline import baseline
from planner.ledger import ATTRIBUTES, Ledger
from planner.model import ModelShape
from planner.optimizations import all_optimizations
from planner.optimizations.base import Knobs, Needs, Optimization, Scalar, Situation
from planner.symbols import Letters


def model_letters(model: ModelShape) -> dict[str, int]:
    """The letters a model gives values to."""
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
        "m": model.norms_per_layer - model.output_norms_per_layer,
        "i": 0 if model.parallel_block else model.norms_per_layer - 1,
        "k": 1 + int(0 < model.sliding_layers < model.layers),
        "v": int(model.fused_qkv) * (model.heads + model.kv_heads) * model.head_size,
        "Q": int(model.norm == "rmsnorm"),
        "q": int(model.qk_norm),
        "f": saved,
        "g": alive,
        "Y": int(not model.tied_head),
        "U": model.adapted_width(),
        "I": len(model.linears),
    }


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

    def at(self, *, batch: object, total: object, target: object, workspace: int) -> Letters:
        """All letters for a run; numbers or numpy arrays of them."""
        return Letters(**{**self.letters, "B": batch, "S": total, "T": target, "Z": workspace})


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
                found[choice.id].append(f"nothing here makes {term}; {_makers(term, known)}")
        for term in sorted(choice.makes):
            found[choice.id] += [f"{term} is already made by {other}" for other in made_by[term] if other != choice.id]
        for need in choice.requires:
            if isinstance(need, Needs) and need.term not in existing:
                found[choice.id].append(
                    f"{need.because}, and nothing here makes {need.term}; {_makers(need.term, known)}"
                )
    return {name: tuple(dict.fromkeys(reasons)) for name, reasons in found.items() if reasons}


def _makers(term: str, known: Mapping[str, Optimization]) -> str:
    makers = [name for name, candidate in known.items() if term in candidate.makes]
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
        onto = Configuration(
            (), {}, _nothing_on(), letters, {"dtype": "fp32", "attention": "eager", "executor": "resident"}
        )
    ledger, letters = onto.ledger, dict(onto.letters)
    settings, complete = dict(onto.settings), dict(onto.knobs)
    made = {*ledger.terms, *ledger.work}
    waiting = [known[name] for name in sorted(names.difference(onto.ids))]
    while waiting:
        ready = next((c for c in waiting if {_term(claim) for claim in c.claims} - {""} <= made | c.makes), None)
        assert ready is not None, f"compose an invalid set: {[c.id for c in waiting]}"
        waiting.remove(ready)
        values = {knob.name: knobs.get(ready.id, {}).get(knob.name, knob.choices(situation)[0]) for knob in ready.knobs}
        before = ledger
        ledger = ready.rewrite(ledger, values, situation)
        assert set(ledger.terms) - set(before.terms) == set(ready.makes), f"{ready.id} makes other terms than it says"
        assert set(ledger.work) - set(before.work) == set(ready.adds), f"{ready.id} adds other work than it says"
        assert _changed(before, ledger) <= ready.claims, f"{ready.id} changes more than it claims"
        made = {*ledger.terms, *ledger.work}
        letters |= ready.letters(situation, values)
        settings |= ready.settings(situation, values)
        complete[ready.id] = values
    return Configuration(
        tuple(sorted(names)), {name: complete[name] for name in sorted(names)}, ledger, letters, settings
    )


# What streaming goes by where nothing streams: the whole sequence and all heads at once, every layer input as it is.
STREAMING = {"c": 2**40, "d": 2**20, "X": 0, "s": 1, "b": 0, "u": 0}


def _claimed_letters(situation: Situation) -> dict[str, int]:
    """The letters that optimisations claim, before any does; and how weights come in from a GGUF file."""
    gguf = int(situation.model.quantized == "gguf")
    staged = gguf * int(situation.gpu.kind == "gpu")
    return {"a": 32, "w": 32, "h": 0, "e": 1, "A": situation.model.layers, "p": 0, "G": gguf, "W": staged} | STREAMING


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

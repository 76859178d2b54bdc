"""All optimisations: one file each, in a folder for its area. Importing the package registers them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import walk_packages
from types import MappingProxyType

from planner.errors import PlanError, did_you_mean
from planner.optimizations.base import REGISTRY, Optimization, Scalar
from planner.optimizations.item import GIVEN, NUMBERED, Given, Item

ENTRY_POINTS = "planner.optimizations"


@cache
def _load() -> None:
    for module in walk_packages(__path__, __name__ + "."):
        import_module(module.name)
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever another package does, it is that package that is named
            owner = entry.dist.name if entry.dist else entry.value
            why = f"its optimisation {entry.name} cannot be loaded: {type(error).__name__}: {error}."
            raise PlanError(f"package {owner}", why, f"pip uninstall {owner} leaves it out.") from error


def all_optimizations() -> Mapping[str, Optimization]:
    """Every registered optimisation by id, in a fixed order; further packages may add theirs by entry point."""
    _load()
    return _instances(tuple(REGISTRY.values()))


def later_knobs(name: str) -> dict[str, Scalar]:
    """Of one optimisation those knobs that plans were written without once, as everything was then; else none."""
    found = all_optimizations().get(name)
    return {knob.name: knob.before for knob in found.knobs if knob.before is not None} if found else {}


def given_items() -> Mapping[str, Given]:
    """What no plan switches on or off, by id, in a fixed order."""
    _load()
    return {name: GIVEN[name]() for name in sorted(GIVEN)}


def all_items() -> Mapping[str, Item]:
    """Everything that stands for a numbered item, or for none: by number, then by id."""
    items: list[Item] = [*all_optimizations().values(), *given_items().values()]
    return {each.id: each for each in sorted(items, key=lambda each: (each.numbers or (NUMBERED + 1,), each.id))}


@cache
def _instances(kinds: tuple[type[Optimization], ...]) -> Mapping[str, Optimization]:
    return MappingProxyType({kind.id: kind() for kind in sorted(kinds, key=lambda kind: kind.id)})


def by_id(name: str) -> Optimization:
    """One optimisation.

    Raises:
        PlanError: there is none of that name.
    """
    known = all_optimizations()
    if name not in known:
        raise PlanError(f"optimisation '{name}'", "is not known.", did_you_mean(name, known, "plan optimizations"))
    return known[name]

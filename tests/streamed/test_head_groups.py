"""Groups of heads: what the planner counts is what the executor makes, and what the search offers is of one size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from planner.hardware import load_profile
from planner.model import list_models, load_model
from planner.optimizations.base import Situation
from planner.optimizations.executor.streamed import heads_at_once
from planner.streamed_memory import group_heads, group_key_heads
from trainer.streamed.row import Group, head_groups


def _widths(groups: list[Group]) -> set[tuple[int, int]]:
    return {(group.last - group.first, group.key_last - group.key_first) for group in groups}


@pytest.mark.parametrize("model", [facts.id for facts in list_models()])
def test_offered_groups_are_of_one_size(model: str) -> None:
    shape = load_model(model)
    offered = heads_at_once(Situation(load_profile("rtx4090"), shape, 2**35))
    assert 1 in offered and list(offered) == sorted({*offered}, reverse=True)
    for heads in offered:
        x: Any = SimpleNamespace(H=shape.heads, K=shape.kv_heads, H_g=heads)
        assert _widths(head_groups(shape.heads, shape.kv_heads, int(heads))) == {(group_heads(x), group_key_heads(x))}
        assert group_heads(x) == heads


@pytest.mark.parametrize(("heads", "key_heads"), [(32, 32), (24, 8), (14, 2), (9, 3), (24, 2), (40, 8), (4, 1), (7, 7)])
def test_the_widest_of_any_groups_is_what_is_counted(heads: int, key_heads: int) -> None:
    for at_most in range(1, heads + 3):
        x: Any = SimpleNamespace(H=heads, K=key_heads, H_g=at_most)
        assert max(_widths(head_groups(heads, key_heads, at_most))) == (group_heads(x), group_key_heads(x))

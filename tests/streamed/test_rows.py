"""Rows that lie apart cross in one call where that is possible, and arrive whole in any case."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.streamed import rows
from trainer.streamed.rows import copy_rows, in_one_call


def test_rows_with_gaps_arrive_whole() -> None:
    source = torch.arange(5 * 7 * 3.0).view(5, 7, 3)
    target = torch.zeros(5, 9, 3)
    copy_rows(target[1:4, 2:6], source[2:5, 1:5])
    expected = torch.zeros(5, 9, 3)
    expected[1:4, 2:6] = source[2:5, 1:5]
    assert torch.equal(target, expected)


@pytest.mark.parametrize("shape", [(4, 6, 8), (1, 6, 8)])
def test_rows_without_gaps_of_their_own_go_in_one_call(shape: tuple[int, ...]) -> None:
    target = torch.empty(shape)
    assert in_one_call(target, torch.empty(shape))
    assert in_one_call(target, torch.empty(shape[0], shape[1] + 3, shape[2])[:, 1:-2])


def test_rows_that_are_not_go_one_by_one() -> None:
    token_by_token = torch.empty(6, 4, 8).transpose(0, 1)
    assert not in_one_call(torch.empty(4, 6, 8), token_by_token)
    shown_twice = torch.empty(1, 6, 8).expand(4, 6, 8)
    assert not in_one_call(torch.empty(4, 6, 8), shown_twice)
    far = torch.empty_strided((2, 8), (2**31, 1), dtype=torch.uint8, device="meta")
    assert not in_one_call(torch.empty(2, 8, dtype=torch.uint8), far)


class _Runtime:
    """The driver's call as it is documented, on memory of the CPU."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, 0

    def cudaMemcpy2DAsync(
        self, target: int, pitch: int, source: int, other: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[int]:
        import ctypes

        self.calls += 1
        assert width <= min(pitch, other) and kind == 2 and stream == 7
        for row in range(height):
            ctypes.memmove(target + row * pitch, source + row * other, width)
        return (self.code,)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> _Runtime:
    made = _Runtime()
    monkeypatch.setattr(rows, "bindings", lambda: made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    return made


def test_the_call_is_given_addresses_pitches_and_widths_in_bytes(runtime: _Runtime) -> None:
    source = torch.arange(4 * 9 * 8, dtype=torch.bfloat16).view(4, 9, 8)
    target = torch.zeros(6, 4, 8, dtype=torch.bfloat16)
    rows._copy_in_one_call(target[1:5], source[:, 3:7])
    assert runtime.calls == 1 and torch.equal(target[1:5], source[:, 3:7])
    assert not target[0].any() and not target[5].any()


def test_a_copy_that_the_driver_refuses_is_told_of(runtime: _Runtime) -> None:
    runtime.code = 700
    whole: Any = torch.zeros(2, 3, 4)
    with pytest.raises(RuntimeError, match="2 rows of 48 bytes: CUDA error 700"):
        rows._copy_in_one_call(whole.clone(), whole)

"""What PowerSGD holds and sends, on two processes: as much again as the gradients, and no less for adapters."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

RANK = 8  # of the claim


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _train(rank: int, port: int, shapes: tuple[tuple[int, int], ...], out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in shapes)))
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=RANK, start_powerSGD_iter=2, min_compression_rate=2
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    for step in range(4):
        torch.manual_seed(10 * step + rank)
        model(torch.randn(3, shapes[0][1])).square().sum().backward()
        model.zero_grad()
    held: dict[str, Any] = {
        "error": sum(each.nbytes for each in state.error_dict.values()),
        "factors": sum(each.nbytes for kept in (state.p_memory_dict, state.q_memory_dict) for each in kept.values()),
        "gradients": sum(each.numel() * each.element_size() for each in model.parameters()),
        "ratio": state.compression_stats()[0],
    }
    if rank == 0:
        torch.save(held, out)
    distributed.destroy_process_group()


def _held(tmp_path: Path, *shapes: tuple[int, int]) -> dict[str, Any]:
    out = tmp_path / "held.pt"
    multiprocessing.spawn(_train, args=(_port(), shapes, str(out)), nprocs=2)
    found: dict[str, Any] = torch.load(out)
    return found


@pytest.mark.slow
def test_a_full_matrix_takes_its_gradient_once_more(tmp_path: Path) -> None:
    held = _held(tmp_path, (256, 256))
    assert held["error"] == held["gradients"] == 4 * 256 * 256
    assert held["factors"] == 4 * RANK * (256 + 256)
    assert held["ratio"] == pytest.approx(256 * 256 / (RANK * (256 + 256))), "half of what one factor alone would be"


@pytest.mark.slow
def test_adapters_are_not_compressed(tmp_path: Path) -> None:
    """A of [R, 256] and B of [256, R]: at rank 8 the product would be as large as the matrix itself."""
    held = _held(tmp_path, (RANK, 256), (256, RANK))
    assert held["ratio"] == 1 and held["factors"] == 0

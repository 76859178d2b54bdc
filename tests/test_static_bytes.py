"""Bytes that do not depend on the sequence, against a GPU's report and against real tensors."""

import pytest
import torch

from planner.compose import compose
from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations.base import Situation

PHI_2_ON_A_GPU = 1_824_899_584  # weights as NF4 with double quantisation, the rest in 16 bits, reported by a GPU
SMALL_CARD = ("lora", "mixed_precision", "nf4_weights", "exact_attention", "chunked_loss", "gradient_checkpointing")


def _bytes(rank: int, *more: str) -> dict[str, int]:
    situation = Situation(load_profile("rtx2060s"), load_model("phi-2"), 2**35)
    made = compose((*SMALL_CARD, *more), {"lora": {"rank": rank}}, situation)
    return made.ledger.bytes(made.at(batch=1, total=4096, target=4096, workspace=0))


def test_phi_2_weights_agree_with_a_gpu() -> None:
    weights = sum(size for name, size in _bytes(16).items() if name.startswith("weights/"))
    assert weights == pytest.approx(PHI_2_ON_A_GPU, rel=0.002)


def test_adapters_of_phi_2_are_exact() -> None:
    sizes = _bytes(16)
    assert sizes["adapters/weights"] == 4 * 23_592_960 == sizes["gradients/adapters"]
    assert sizes["optimizer/state"] == 8 * 23_592_960


def test_nf4_constants_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(2560, 2560)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    constants = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    counted = sum(tensor.numel() * tensor.element_size() for tensor in constants)
    scales = weight.numel() // 64
    assert packed.numel() * packed.element_size() == weight.numel() // 2
    assert counted == scales + 4 * (scales // 256) + 16 * 4 + 256 * 4 + 4


def test_eight_bit_adamw_state_is_that_of_bitsandbytes() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    matrices = [torch.nn.Parameter(torch.randn(16, 2560)), torch.nn.Parameter(torch.randn(10240, 16))]
    optimizer = optim.AdamW8bit(matrices, lr=1e-3)
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    optimizer.step()
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    sizes = _bytes(16, "adamw_8bit")
    predicted = (sizes["optimizer/state"] + sizes["optimizer/scales"]) / 23_592_960
    counted = sum(tensors.values()) / sum(matrix.numel() for matrix in matrices)
    assert predicted == pytest.approx(counted, rel=0.03)

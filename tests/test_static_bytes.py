"""Bytes that do not depend on the sequence, against a GPU's report and against real tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from planner.adapter_matrices import adapter_letters
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


@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16])
@pytest.mark.parametrize("model", ["phi-2", "smollm2-135m", "qwen2.5-0.5b", "phi-3.5-mini"])
def test_eight_bit_adamw_state_is_that_of_bitsandbytes(model: str, rank: int) -> None:
    """To the byte: small matrices in float32, blocks begun, tables once."""
    optim = pytest.importorskip("bitsandbytes.optim")
    shape = replace(load_model(model), layers=2)
    sizes = [size for linear in shape.linears for size in ((rank, linear.inputs), (linear.outputs, rank))]
    matrices = [torch.nn.Parameter(torch.zeros(size)) for _ in range(shape.layers) for size in sizes]
    optimizer = optim.AdamW8bit(matrices, lr=1e-3)
    for index, group in enumerate(optimizer.param_groups):
        for place, matrix in enumerate(group["params"]):
            optimizer.init_state(group, matrix, index, place)
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    situation = Situation(load_profile("rtx4090"), shape, 2**35)
    made = compose(("lora", "adamw_8bit"), {"lora": {"rank": rank}}, situation)
    planned = made.ledger.bytes(made.at(batch=1, total=64, target=64, workspace=0))
    assert sum(size for name, size in planned.items() if name.startswith("optimizer/")) == sum(tensors.values())


def test_what_depends_on_each_matrix_is_the_same_for_one_rank_and_for_many() -> None:
    shape = load_model("smollm2-135m")
    ranks = np.array([1, 2, 3, 7, 8, 64])
    together = adapter_letters(shape, ranks)
    for place, rank in enumerate(ranks.tolist()):
        alone = adapter_letters(shape, rank)
        assert all(type(value) is int for value in alone.values())
        assert {name: int(value[place]) for name, value in together.items()} == alone
    assert 0 < together["M_s"][2] < 3 * shape.adapted_width() and together["M_s"][-1] == 0

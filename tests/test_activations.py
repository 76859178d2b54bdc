"""What activation functions save and hold, counted on transformers' own."""

import pytest
import torch
from transformers.activations import ACT2FN

from planner.activations import ACTIVATIONS, mlp_tensors
from trainer.counting import TensorBytes

WIDTH = 4096


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_saved_tensors(name: str) -> None:
    x, kept = torch.randn(WIDTH, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = ACT2FN[name](x)
    saved = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() == WIDTH}
    assert len(saved - {y.untyped_storage().data_ptr()}) == ACTIVATIONS[name].saved


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_tensors_alive_without_autograd(name: str) -> None:
    x = torch.randn(WIDTH)
    with torch.no_grad(), TensorBytes([x]) as counted:
        ACT2FN[name](x)
    assert counted.peak == ACTIVATIONS[name].alive * x.untyped_storage().nbytes()


@pytest.mark.parametrize("name", sorted(n for n, each in ACTIVATIONS.items() if each.fused))
def test_a_fused_function_is_one_operation(name: str) -> None:
    fused = ACTIVATIONS[ACTIVATIONS[name].fused]
    assert not fused.fused and fused.saved == 1 and fused.alive == 2


def test_a_gated_mlp_saves_the_up_projection_and_the_product_too() -> None:
    assert mlp_tensors("silu", gated=True) == (4, 3)
    assert mlp_tensors("gelu", gated=False) == (2, 2)
    assert mlp_tensors("gelu_new", gated=False) == (5, 4)

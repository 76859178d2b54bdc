"""Activation functions of an MLP: how many tensors of its width each one saves and holds, as transformers has them.

Counted on the functions of ``transformers.activations`` (5.17 to 5.23); ``tests/test_activations.py`` counts again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """One activation function.

    Attributes:
        saved: tensors it saves for its backward pass, its output left out, which the next linear saves anyway.
        alive: tensors alive at once while it runs without autograd, input and output among them.
        fused: the same function as one operation of torch, by its name in transformers; empty where it is one.
    """

    saved: int
    alive: int
    fused: str = ""


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(1, 2),
    "gelu_10": Activation(2, 3),
    "gelu_accurate": Activation(4, 4, "gelu_pytorch_tanh"),
    "gelu_fast": Activation(7, 5, "gelu_pytorch_tanh"),
    "gelu_new": Activation(4, 4, "gelu_pytorch_tanh"),
    "gelu_python": Activation(3, 4, "gelu"),
    "gelu_python_tanh": Activation(4, 4, "gelu_pytorch_tanh"),
    "gelu_pytorch_tanh": Activation(1, 2),
    "hardswish": Activation(1, 2),
    "laplace": Activation(1, 4),
    "leaky_relu": Activation(1, 2),
    "linear": Activation(0, 1),
    "mish": Activation(1, 2),
    "quick_gelu": Activation(2, 3),
    "relu": Activation(0, 2),
    "relu2": Activation(1, 3),
    "relu6": Activation(1, 2),
    "sigmoid": Activation(0, 2),
    "silu": Activation(1, 2),
    "sqrtsoftplus": Activation(1, 3),
    "swish": Activation(1, 2),
    "tanh": Activation(0, 2),
}


def mlp_tensors(activation: str, *, gated: bool, fused: bool = False) -> tuple[int, int]:
    """Tensors of width F that the MLP of a layer saves (letter f), and that live at once without autograd (g).

    Beside what the activation function saves: its output, where the MLP is gated the up projection and their
    product as well. While a gated MLP multiplies, three are alive: activation, up projection and product; four where
    one linear gives gate and up together, since they are one tensor.
    """
    function = ACTIVATIONS[activation]
    return function.saved + (3 if gated else 1), max(function.alive, (4 if fused else 3) if gated else 2)


def compiled_tensors(*, gated: bool) -> tuple[int, int]:
    """The same two where the layer is compiled, whatever the activation function is.

    One kernel reads gate and up projection and writes their product; backward it reads them again. Where there is no
    gate it reads what the first linear gave and writes what the last one reads.
    """
    return (3, 3) if gated else (2, 2)


def expert_tensors(activation: str, *, clamped: bool) -> tuple[int, int]:
    """Tensors of width F that one row of an expert saves, and that live at once without autograd.

    Gate and up projection are one tensor, saved whole, and the activation function's output; the product is the input
    of a frozen weight, which saves none. GPT-OSS clamps both and has a gate of its own, six tensors in all.
    """
    if clamped:
        return 6, 9
    function = ACTIVATIONS[activation]
    return function.saved + 2, max(function.alive + 2, 4)

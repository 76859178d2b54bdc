"""The formulas of layers with experts, which transformers computes by grouped products (its ``grouped_mm``).

Each token has a row for each of the ``d`` experts that it takes, whatever these are: so memory does not depend on the
routing. All of them are 0 where a layer has none.
"""

from __future__ import annotations

from planner.symbols import Letters, Number, greatest, least


def experts(x: Letters) -> Number:
    """Gate, up and down projection of every expert of every layer."""
    return x.L * expert_weights(x)


def expert_weights(x: Letters) -> Number:
    """The same in one layer."""
    return 3 * x.X * x.D * x.F


def routers(x: Letters) -> Number:
    """What scores the experts in every layer, and their biases."""
    return x.L * x.j


def rows(x: Letters) -> Number:
    """Rows of all experts together in one layer."""
    return x.B * x.S * x.d


def saved_outputs(x: Letters) -> Number:
    """What each row gives, saved to differentiate its weight by."""
    return x.A * rows(x) * x.D


def saved_routing(x: Letters) -> Number:
    """Bytes of scores, of experts and weights by row, and of the order of rows and back."""
    return x.A * (x.B * x.S * 4 * x.X * (1 - x.b) + rows(x) * (34 + x.a // 8 * (1 - x.y) + 8 * x.y))


def _behind(x: Letters) -> Number:
    """Tensors of width D a row has behind its expert, in elements of the compute dtype.

    Its input, the expert's output, that weighted, and again in the order of tokens: in float32 where the weights are;
    and a bias where there is one.
    """
    return 2 + 2 * _widening(x) + x.b


def _widening(x: Letters) -> Number:
    return 1 + x.y * (32 // x.a - 1)


def height(x: Letters) -> Number:
    """Elements of a token at the height of an MLP, or of experts, run without autograd.

    Experts hold each row's input beside ``g`` tensors of width F, or what there is behind them.
    """
    return greatest(x.g * x.F + x.d * x.D, _behind(x) * x.d * x.D)


def over_saved_forward(x: Letters) -> Number:
    """The same with autograd, beyond what is saved: behind an expert all but its output, and of width F the product.

    GPT-OSS's gate saves one tensor that is gone otherwise.
    """
    narrow = least(x.d, 1) * (x.g - x.f + x.b * x.d) * x.F
    return greatest(narrow, (_behind(x) - 1) * x.d * x.D)


def over_saved_backward(x: Letters) -> Number:
    """Elements of a token at the height of the experts' backward pass, beyond what is saved.

    Either where the product of gate and up projection is differentiated, with the experts' outputs gone; or before,
    where the weighting is: the gradient of what was weighted, and of the two that it was made of, the output's again in
    16 bits where the others are not.
    """
    weighting = 3 * _widening(x) + _widening(x) - 1
    return greatest(3 * x.d * x.F - x.d * x.D, weighting * x.d * x.D)

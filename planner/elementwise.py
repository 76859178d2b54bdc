"""Bytes that a layer moves through the card's memory between its products, counted op by op.

Nothing is fused where a model runs op by op: each op that is no view reads what it is given and writes what it gives.
Where layers are compiled (letter k_c), what lies between two products is one kernel, which reads and writes once: that
follows from the formulas of what is written out, and is counted by no test.
An adapter's products are narrow, so that they take as long as their operands are moved; they count here too. Held to a
count of the trainer's own step by ``tests/test_traffic.py``.

Everything is in *strides*: elements of one token, times the bytes of an activation or of a float32.
"""

from __future__ import annotations

from planner.symbols import Letters, Number, greatest, least

WIDE = 4
"""Bytes of a float32."""


def narrow(x: Letters) -> Number:
    """1 where activations have 16 bits, so that what is computed in float32 is cast there and back."""
    return 1 - x.a // 32


def norm(x: Letters, width: Number) -> Number:
    """Bytes of one norm of a token, forward: LayerNorm is one op; RMSNorm is eight, most of them in float32."""
    cast, size = narrow(x), x.a // 8
    # Squared, averaged, scaled; cast to float32 and back. Where outputs are normed, the weight is one plus another.
    wide = (5 + cast) * WIDE + 2 * size + cast * (WIDE + 2 * size + 4 * least(x.z, 1))
    return width * (x.Q * wide + (1 - x.Q) * 2 * size)


def norm_backward(x: Letters, width: Number) -> Number:
    """Bytes of the gradient of one norm's input; its weight is frozen."""
    cast, size = narrow(x), x.a // 8
    wide = 17 * WIDE + 2 * size + cast * 2 * (WIDE + size)
    return width * (x.Q * wide + (1 - x.Q) * 3 * size)


def turned(x: Letters) -> Number:
    """Elements of a token's query and key that rotary embedding turns."""
    return (x.H + x.K) * least(x.o, x.E)


def cut(x: Letters) -> Number:
    """Elements of query and key where only a part of each head is turned, and joined with the rest again."""
    return least(x.o, 1) * least(greatest(x.E - x.o, 0), 1) * (x.H + x.K) * x.E


def adapters_between(x: Letters) -> Number:
    """Inputs plus outputs of the adapted linears before attention. Approximate: the three of a layer, or none."""
    return least(x.U, 3 * x.D + (x.H + 2 * x.K) * x.E)


def gated(x: Letters) -> Number:
    """1 where the MLP has a gate: its linears are three of D x F, and else two."""
    rest = x.P - x.D * (2 * x.H + 2 * x.K) * x.E
    return greatest(least(greatest(rest // (x.D * x.F) - 2, 0), 1), least(x.d, 1))


def written_out(x: Letters) -> Number:
    """Tensors that an activation function saves beside its input, where it is written out in several ops."""
    return greatest(x.f - 2 - 2 * gated(x), 0)


def rotary(x: Letters, turning: int, cutting: int) -> Number:
    """Bytes of turning a token's query and key, given the strides of each where it is written out."""
    written_out = turning * turned(x) + cutting * cut(x)
    return x.a // 8 * ((1 - x.k_c) * written_out + x.k_c * 2 * greatest(turned(x), cut(x)))


def tables(x: Letters) -> Number:
    """Bytes of a token that is embedded to learn its cosines and sines, which are made in float32."""
    return 2 * x.D * x.a // 8 + x.o * (10 * WIDE + 2 * (WIDE + x.a // 8))


def put(x: Letters) -> Number:
    """Bytes of a token's query, key and value laid out by heads; what was cut and joined lies so already."""
    cut_heads = least(cut(x), 1)
    return 2 * x.a // 8 * (x.H + 2 * x.K - cut_heads * (x.H + x.K)) * x.E


def before(x: Letters) -> Number:
    """Bytes of a token from a layer's input to query, key and value, forward."""
    size, heads = x.a // 8, (x.H + x.K) * x.E
    return norm(x, x.D) + x.q * norm(x, heads) + rotary(x, 10, 2) + 3 * size * adapters_between(x) // 2


def before_backward(x: Letters) -> Number:
    """Bytes of the gradient of the same: of three linears' input by base and adapter, which are summed."""
    size, heads = x.a // 8, (x.H + x.K) * x.E
    return (
        norm_backward(x, x.D)
        + x.q * norm_backward(x, heads)
        + rotary(x, 16, 7)
        + 2 * size * adapters_between(x)
        + (15 - 9 * x.k_c) * size * x.D
        + 2 * size * (x.H + 2 * x.K) * x.E
    )


def after(x: Letters) -> Number:
    """Bytes of a token from attended values and the layer's input to the layer's output, forward."""
    size, width = x.a // 8, x.F * greatest(x.d, 1)
    activation = width * size * (2 + 16 * written_out(x) // 3 + (3 - 2 * x.k_c) * gated(x))
    norms = (x.n - 1) * norm(x, x.D)
    return activation + norms + 6 * size * x.D + 3 * size * (x.U - adapters_between(x)) // 2


def after_backward(x: Letters) -> Number:
    """Bytes of the gradient of the same."""
    size, width = x.a // 8, x.F * greatest(x.d, 1)
    activation = width * size * (6 - 2 * x.k_c + 25 * written_out(x) // 3 + (6 - 4 * x.k_c) * gated(x))
    norms = greatest(x.n - 1, 1) * norm_backward(x, x.D)  # of a parallel block the one that MLP and attention read
    sums = size * (3 * x.H * x.E + x.D * (6 + 6 * gated(x)))
    return activation + norms + sums + 2 * size * (x.U - adapters_between(x))

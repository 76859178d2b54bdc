"""Every letter that a formula may use, once: its meaning, its unit, and the words config and CLI call it by.

Formulas are plain functions of a namespace of letters (``lambda x: x.B * x.S * x.D``). Called with numbers or
numpy arrays they give bytes; called with ``symbolic_letters()`` the very same functions give sympy expressions,
for `plan explain`, LaTeX and the property tests. So there is one truth and nothing to compile at start-up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal


@dataclass(frozen=True)
class Letter:
    """One letter: how formulas write it, what it means, its unit, its word in config, its least value."""

    symbol: str
    meaning: str
    unit: str
    word: str = ""
    least: int = 1


LETTERS: tuple[Letter, ...] = (
    # The run
    Letter("B", "sequences in one micro-batch", "sequences", "batch"),
    Letter("S", "tokens of one sequence: context plus target", "tokens", "total_tokens"),
    Letter("T", "trained tokens of one sequence, that is rows of logits", "tokens", "target"),
    Letter("S_k", "tokens whose keys and values are kept while text is written: prompt and all that is new", "tokens"),
    Letter("W_m", "1 where the adapters are merged into the weights after training", "flag", "train.merge", least=0),
    Letter("d_r", "documents that share one row at most", "documents", "sequence_packing.documents"),
    # The model
    Letter("L", "decoder layers", "layers", "layers"),
    Letter("D", "width of the model (hidden size)", "elements", "width"),
    Letter("F", "width of the MLP (intermediate size)", "elements", "mlp_width"),
    Letter("H", "query heads", "heads", "heads"),
    Letter("K", "key and value heads", "heads", "kv_heads"),
    Letter("E", "width of one head", "elements", "head_size"),
    Letter(
        "O",
        "inverse frequencies that rotary embedding holds, in use, as first computed, and for long rows",
        "elements",
        least=0,
    ),
    Letter("o", "cosines that rotary embedding holds for one token, in all its tables", "elements", least=0),
    Letter("V", "rows of the vocabulary", "rows", "vocab"),
    Letter("P", "weights in the linears of one layer, biases left out", "elements"),
    Letter("N", "norm weights and biases of the whole model", "elements"),
    Letter("M", "weights in the largest linear of a layer", "elements"),
    Letter("J", "linears in one layer", "linears"),
    Letter("n", "norms of width D in one layer", "norms"),
    Letter("m", "norms of a layer whose output linears read", "norms"),
    Letter("k", "masks that stored scores need: one, or two where only some layers have a window", "masks"),
    Letter("l", "layers whose tokens see a window of keys only", "layers", least=0),
    Letter("s", "tokens of that window, the token itself among them", "tokens"),
    Letter("c", "1 where attention scores are soft-capped by tanh", "flag", least=0),
    Letter("t", "1 where logits are soft-capped by tanh", "flag", least=0),
    Letter("r", "learned rows of positions, none where positions are turned", "rows", least=0),
    Letter("u", "1 where stored scores have their softmax in the compute dtype, not in float32", "flag", least=0),
    Letter("i", "tensors that the norms of a layer read, beside the layer's input", "tensors", least=0),
    Letter(
        "v",
        "elements of a token that its value keeps alive, where one linear gives query, key and value",
        "elements",
        least=0,
    ),
    Letter(
        "Q",
        "1 where the norms are RMSNorm, which transformers writes out in float32, 0 where a norm is one operation",
        "flag",
        least=0,
    ),
    Letter("n_s", "float32 numbers that a norm saves of each token: 2 of LayerNorm, 1 of RMSNorm", "numbers"),
    Letter("q", "1 where query and key have a norm of their own", "flag", least=0),
    Letter("f", "tensors of width F that the MLP of a layer saves for its backward pass", "tensors"),
    Letter("g", "tensors of width F alive at once while the MLP runs without autograd", "tensors"),
    Letter("X", "experts in one layer", "experts", least=0),
    Letter("d", "experts that a token takes, 0 where the MLP is a plain one", "experts", least=0),
    Letter("j", "elements of a layer's router and of its experts' biases", "elements", least=0),
    Letter("b", "1 where experts have biases, and only those taken have a part in the softmax", "flag", least=0),
    Letter("y", "1 where the weights of a token's experts are float32", "flag", least=0),
    Letter("z", "norms of a layer that norm what attention and MLP give", "norms", least=0),
    Letter("j_r", "1 where what attention and MLP give is scaled before it is added", "flag", least=0),
    Letter("Y", "1 where the output head has a weight of its own, 0 where it is the embedding", "flag", least=0),
    Letter("G", "1 where the weights are read from a GGUF file", "flag", least=0),
    Letter(
        "W", "copies of the weights in host memory while they are loaded, before they move to a card", "copies", least=0
    ),
    # The adapters
    Letter("R", "rank of the adapters", "ranks", "lora.rank"),
    Letter("U", "inputs plus outputs, summed over the adapted linears of one layer", "elements"),
    Letter("I", "adapted linears in one layer", "linears"),
    Letter("M_s", "elements in those adapter matrices of a layer that have fewer than 4,096 each", "elements", least=0),
    Letter(
        "M_b", "blocks of 256 elements, the last of a matrix begun, in its other adapter matrices", "blocks", least=0
    ),
    # Widths of elements
    Letter("a", "bits of one activation element", "bits"),
    Letter("w", "bits of one frozen weight that is not quantised", "bits"),
    Letter("h", "1 where activations are float16, whose softmax reads them as they are", "flag", least=0),
    # Choices of an optimisation
    Letter("e", "1 where attention stores its scores", "flag", least=0),
    Letter("A", "layers whose saved tensors live at once", "layers"),
    Letter("p", "forward passes of a layer that the backward pass repeats", "passes", least=0),
    Letter("C", "rows of logits alive at once in the chunked loss", "rows", "chunked_loss.rows"),
    Letter("S_c", "tokens of a chunk, computed at once where layers run in passes", "tokens", "streamed.chunk"),
    Letter("S_b", "tokens of a block of the row, by which attention goes", "tokens", "sequence_blocks.tokens"),
    Letter("H_g", "query heads of a group, whose attention is computed at once", "heads", "streamed.heads"),
    Letter("j_h", "1 where what lies between the passes of a layer is in host memory", "flag", least=0),
    Letter("l_r", "1 where the loss takes the sequences of a batch one by one", "flag", least=0),
    Letter("L_s", "layers for which one input is kept", "layers", "checkpoint_spacing.every"),
    Letter("b_c", "bits of 64 elements of a kept layer input where it is coded, else 0", "bits", least=0),
    Letter("k_c", "1 where layers are compiled", "flag", least=0),
    Letter("k_a", "1 where what attention gave is kept for the backward pass", "flag", least=0),
    # The machine
    Letter("Z", "workspace that cuBLAS keeps for one handle and stream", "bytes", least=0),
)

BY_SYMBOL: dict[str, Letter] = {letter.symbol: letter for letter in LETTERS}
assert len(BY_SYMBOL) == len(LETTERS), "a letter is defined twice"

Letters = SimpleNamespace
Number = Any  # an int, a numpy array of int64, or a sympy expression: formulas take and give all three


@cache
def symbolic_letters() -> Letters:
    """The letters as sympy symbols (imports sympy, about a third of a second, so only on demand)."""
    import sympy

    return Letters(
        **{
            letter.symbol: sympy.Symbol(
                letter.symbol, integer=True, nonnegative=True, positive=letter.least > 0 or None
            )
            for letter in LETTERS
        }
    )


class _Watched:
    """Letters that note which of them a formula reads; every one is 64."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> int:
        if name not in BY_SYMBOL:
            raise AttributeError(name)
        self.read.add(name)
        return 64


@cache
def letters_of(formula: Callable[[Letters], Number]) -> tuple[str, ...]:
    """The letters that a formula reads, in order. Formulas have no branches, so one look sees all of them."""
    watched: Any = _Watched()
    formula(watched)
    return tuple(sorted(watched.read))


_PLAIN = frozenset({int, float})
"""As most numbers are: formulas are evaluated by the hundred thousand."""


def _symbolic(first: Number, second: Number) -> bool:
    sympy = sys.modules.get("sympy")
    return sympy is not None and (isinstance(first, sympy.Basic) or isinstance(second, sympy.Basic))


def ceil_div(count: Number, unit: Number) -> Number:
    """The least whole number of units that hold ``count``; both are whole and not negative."""
    if (type(count) not in _PLAIN or type(unit) not in _PLAIN) and _symbolic(count, unit):
        import sympy

        return sympy.ceiling(sympy.sympify(count) / unit)
    return -(-count // unit)


def round_up(count: Number, unit: Number) -> Number:
    """``count`` rounded up to a multiple of ``unit``."""
    return ceil_div(count, unit) * unit


@cache
def _symbolic_extreme(name: Literal["Min", "Max"], first: Number, second: Number) -> Number:
    """Kept, since sympy tries for long whether one of two can be told to be the larger, and formulas share parts."""
    import sympy

    return getattr(sympy, name)(first, second)


def least(first: Number, second: Number) -> Number:
    """The smaller of two."""
    if type(first) in _PLAIN and type(second) in _PLAIN:
        return first if first < second else second
    if _symbolic(first, second):
        return _symbolic_extreme("Min", first, second)
    if hasattr(first, "shape") or hasattr(second, "shape"):
        import numpy

        return numpy.minimum(first, second)
    return min(first, second)


def greatest(first: Number, second: Number) -> Number:
    """The larger of two."""
    if type(first) in _PLAIN and type(second) in _PLAIN:
        return first if first > second else second
    if _symbolic(first, second):
        return _symbolic_extreme("Max", first, second)
    if hasattr(first, "shape") or hasattr(second, "shape"):
        import numpy

        return numpy.maximum(first, second)
    return max(first, second)

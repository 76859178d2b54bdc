"""Bytes of the streamed executor: what a chunk of tokens and a group of heads take on the card, what the host holds.

The layer's own formulas hold for a chunk as for a sequence: ``Chunk`` shows them one. Beside them stands what is on its
way: while one piece is computed, the next piece's inputs have arrived, and the last piece's results have not left yet.
"""

from __future__ import annotations

from typing import Any

from planner.baseline_formulas import adapter_inner, layer_backward_bytes, mlp_saved
from planner.expert_formulas import height, saved_outputs, saved_routing
from planner.symbols import Letters, Number, ceil_div, greatest, least


def workspace(x: Letters) -> Number:
    """What cuBLAS keeps for the one thread that goes forward and back (``trainer/training.py``)."""
    return x.Z


def tokens(x: Letters) -> Number:
    """Tokens of a micro-batch: its rows lie behind each other."""
    return x.B * x.S


def chunk_tokens(x: Letters) -> Number:
    """Tokens of a chunk, never more than there are."""
    return least(tokens(x), x.S_c)


def loaded_tokens(x: Letters) -> Number:
    """Tokens of the chunk that is computed and of the next one, on its way: of two, the last may be shorter."""
    return least(tokens(x), 2 * chunk_tokens(x))


def chunks_between(x: Letters) -> Number:
    """1 where a chunk has one before it and one behind it, so that results leave while inputs arrive."""
    return least(greatest(ceil_div(tokens(x), chunk_tokens(x)) - 2, 0), 1)


class Chunk:
    """Letters as formulas of one layer see them while it computes one chunk: one short sequence, one layer."""

    def __init__(self, letters: Letters) -> None:
        self._letters = letters

    def __getattr__(self, name: str) -> Any:
        if name == "S":
            return chunk_tokens(self._letters)
        return 1 if name in ("B", "A") else getattr(self._letters, name)


def group_heads(x: Letters) -> Number:
    """Query heads of a group, never more than there are; those of whole key heads, where it reads more than one."""
    heads, readers = least(x.H_g, x.H), x.H // x.K
    return greatest(heads // readers * readers, least(heads, readers))


def group_key_heads(x: Letters) -> Number:
    """Key heads that a group reads; a part of one counts as one."""
    return ceil_div(group_heads(x) * x.K, x.H)


def more_groups(x: Letters) -> Number:
    """1 where there is more than one group."""
    return least(ceil_div(x.H, group_heads(x)) - 1, 1)


def groups_between(x: Letters) -> Number:
    """1 where a group has one before it and one behind it, so that results leave while inputs arrive."""
    return least(greatest(ceil_div(x.H, group_heads(x)) - 2, 0), 1)


def projected_width(x: Letters) -> Number:
    """Elements of a token's query, key and value, all heads."""
    return (x.H + 2 * x.K) * x.E


def checkpoints(x: Letters) -> Number:
    """Groups of 64 elements: one hidden state of width D for each kept layer and token."""
    return ceil_div(ceil_div(x.L, x.L_s) * tokens(x) * x.D, 64)


def inner_checkpoints(x: Letters) -> Number:
    """Inputs of the layers between two that are kept."""
    return (least(x.L_s, x.L) - 1) * tokens(x) * x.D


def rotary(x: Letters) -> Number:
    """Rotary tables of the chunk that is computed, where what lies between the passes is in host memory."""
    return x.j_h * 2 * x.o * chunk_tokens(x)


def rotary_on_card(x: Letters) -> Number:
    """Those of all chunks, which are kept where what lies between the passes is on the card too."""
    return (1 - x.j_h) * 2 * x.o * tokens(x)


def row_ids(x: Letters) -> Number:
    """Ids and targets as they come and as one row, and the positions; there until the next micro-batch comes."""
    return 5 * tokens(x)


def staging(x: Letters) -> Number:
    """Query, key and value, attended values and their gradient, and the stream of width D, for every token."""
    return tokens(x) * (projected_width(x) + 2 * x.H * x.E + x.D)


def staging_in_host(x: Letters) -> Number:
    """The same where it lies in host memory, and else nothing."""
    return x.j_h * staging(x)


def staging_on_card(x: Letters) -> Number:
    """The same where it lies on the card, and else nothing."""
    return (1 - x.j_h) * staging(x)


def log_sum_exp_in_host(x: Letters) -> Number:
    """One value for each query and head, where staging is in host memory."""
    return x.j_h * tokens(x) * x.H


def log_sum_exp_on_card(x: Letters) -> Number:
    """One value for each query and head, where staging is on the card."""
    return (1 - x.j_h) * tokens(x) * x.H


def input_loaded(x: Letters) -> Number:
    """Bytes of a chunk's checkpoint, and of the next one's; decoded besides, where it is coded."""
    coded = least(x.b_c, 1)
    stored = x.b_c + (1 - coded) * 64 * x.a
    return x.D * (stored * loaded_tokens(x) + coded * 64 * x.a * chunk_tokens(x)) // 512


def chunk_loaded(x: Letters) -> Number:
    """Bytes of a chunk's attended values and incoming gradient on the card, and of the next chunk's."""
    return x.j_h * loaded_tokens(x) * (x.H * x.E + x.D) * x.a // 8


def chunk_leaving(x: Letters) -> Number:
    """Bytes of the last chunk's gradients of attended values and of the layer's input, on their way to the host."""
    return x.j_h * chunks_between(x) * chunk_tokens(x) * (x.H * x.E + x.D) * x.a // 8


def chunk_attended(x: Letters) -> Number:
    """A chunk's attended values token by token, which the output projection's adapter saves."""
    return chunk_tokens(x) * x.H * x.E


def chunk_mlp(x: Letters) -> Number:
    """Tensors of width F that the MLP saves for a chunk."""
    return mlp_saved(Chunk(x))  # type: ignore[arg-type]


def chunk_backward_bytes(x: Letters) -> Number:
    """Bytes at the height of a chunk's backward pass beyond what is saved and the incoming gradient."""
    return layer_backward_bytes(Chunk(x))  # type: ignore[arg-type]


def chunk_experts(x: Letters) -> Number:
    """What each row of the experts gives for a chunk."""
    return saved_outputs(Chunk(x))  # type: ignore[arg-type]


def chunk_routing(x: Letters) -> Number:
    """Bytes of a chunk's scores of the experts, and of the order of its rows."""
    return saved_routing(Chunk(x))  # type: ignore[arg-type]


def chunk_norms(x: Letters) -> Number:
    """Float32 elements that the norms behind attention save for a chunk; the one before it is not differentiated.

    An RMSNorm that is written out saves its input in float32, and one value for each token. A norm in one operation
    saves its values, and its input where that is not the layer's. Where a block does attention and MLP at once, both
    have the same norm before them.
    """
    one_operation = x.n_s * (x.n - least(x.i, 1)) + x.i * x.D * x.a // 32
    return chunk_tokens(x) * (x.Q * (x.n - 1) * (x.D + 1) + (1 - x.Q) * one_operation)


def chunk_hidden(x: Letters) -> Number:
    """What the MLP reads, and what the layer gives."""
    return 2 * chunk_tokens(x) * x.D


def chunk_adapters(x: Letters) -> Number:
    """Inner activations of the adapters of output projection and MLP."""
    return adapter_inner(Chunk(x))  # type: ignore[arg-type]


def forward_chunk(x: Letters) -> Number:
    """Bytes at the height of a chunk run without autograd: before attention, or after it, whichever is more.

    Approximate: before attention, where query and key are turned by tensors that differ from family to family.
    """
    chunk, loaded, between = chunk_tokens(x), loaded_tokens(x), chunks_between(x)
    before = chunk * (x.D + projected_width(x) * (1 + x.j_h * between) + 4 * x.H * x.E)
    after = chunk * (height(x) + 2 * x.D + x.H * x.E + between * x.D) + x.j_h * loaded * x.H * x.E
    return x.a * (loaded * x.D + greatest(before, after)) // 8


def block_tokens(x: Letters) -> Number:
    """Tokens of a block of a row by which attention goes, never more than a row has; all of them where by none."""
    return least(x.S, x.S_b)


def several_documents(x: Letters) -> Number:
    """1 where a micro-batch may hold several documents."""
    return least(x.B * x.d_r - 1, 1)


def group_forward(x: Letters) -> Number:
    """Bytes of a group of heads over the whole sequence: its inputs and the next one's, its outputs and the last's.

    Outputs of several documents are joined, and for that moment there twice.
    """
    size = tokens(x) * x.E * x.a // 8
    inputs = x.j_h * (1 + more_groups(x)) * size * (group_heads(x) + 2 * group_key_heads(x))
    outputs = size * group_heads(x) + 4 * tokens(x) * group_heads(x)
    return inputs + (1 + x.j_h * groups_between(x) + several_documents(x)) * outputs


def key_head_is_shared(x: Letters) -> Number:
    """1 where several groups read one key head."""
    return 1 - least(group_heads(x) * x.K // x.H, 1)


def group_backward(x: Letters) -> Number:
    """The same in the backward pass: five inputs and the log-sum-exp, three gradients.

    The last group's gradients are on their way; those of a shared key head are summed instead, and leave only once.
    Joining these over documents takes one of them twice, less than the kernel's workspace, which is gone by then.
    """
    size = tokens(x) * x.E * x.a // 8
    leaving = x.j_h * groups_between(x)
    heads, key_heads = group_heads(x), group_key_heads(x)
    inputs = x.j_h * (1 + more_groups(x)) * (size * (3 * heads + 2 * key_heads) + 4 * tokens(x) * heads)
    return inputs + size * ((1 + leaving) * heads + (1 + leaving * (1 - key_head_is_shared(x))) * 2 * key_heads)


def shared_key_heads(x: Letters) -> Number:
    """Gradients of one key and value head in float32, where several groups share it."""
    return key_head_is_shared(x) * 8 * tokens(x) * x.E


def loss_loaded(x: Letters) -> Number:
    """A chunk's last hidden states, and those of the next."""
    return x.j_h * loaded_tokens(x) * x.D


def loss_leaving(x: Letters) -> Number:
    """The gradient of a chunk's last hidden states, and the last chunk's on its way to the host."""
    return (1 + x.j_h * chunks_between(x)) * chunk_tokens(x) * x.D


def loss_rows(x: Letters) -> Number:
    """Trained tokens of a sequence that final norm and loss take at once.

    Approximate: a whole slice of them is counted in a whole chunk that has another before it and behind it
    (``loss_loaded``, ``loss_leaving``), wherever they end. That chunk and slice then see nothing of each other keeps
    the search small, and what is counted is enough for shorter rows, which may end anywhere.
    """
    return least(x.T, x.C)


def loss_gradient(x: Letters) -> Number:
    """The normed hidden states of a slice of trained tokens, or their gradient."""
    return loss_rows(x) * x.D


def loss_norm(x: Letters) -> Number:
    """The final RMSNorm's float32 copy of a slice of trained tokens, and its deviation."""
    return x.Q * loss_rows(x) * (x.D * (1 - x.a // 32) + 1)

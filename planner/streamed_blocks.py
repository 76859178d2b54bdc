"""Bytes and copies of attention by blocks of the row: what of a few blocks is on the card, and how often each crosses.

What the executor does (``trainer/streamed/blocks.py``): forward, a block of queries meets the blocks of keys up to its
own; backward, a block of keys meets the blocks of queries from its own on. While one pair is computed, the next one's
inputs have arrived, and the last one's results have not left yet. Layers with a window go by stretches instead.
"""

from __future__ import annotations

from planner.elementwise import WIDE
from planner.launches import groups
from planner.streamed_memory import (
    block_tokens,
    chunk_tokens,
    group_heads,
    group_key_heads,
    key_head_is_shared,
    more_groups,
    tokens,
)
from planner.streamed_windows import stretch, windowed
from planner.streamed_work import attention_runs_again, head_inputs, key_reads
from planner.symbols import Letters, Number, ceil_div, greatest, least


def row_blocks(x: Letters) -> Number:
    """Blocks of one row, the last one begun."""
    return ceil_div(x.S, block_tokens(x))


def blocks(x: Letters) -> Number:
    """Blocks of all rows of a micro-batch."""
    return x.B * row_blocks(x)


def more_blocks(x: Letters) -> Number:
    """1 where there is more than one block, so that something is on its way while another is computed."""
    return least(blocks(x) - 1, 1)


def more_row_blocks(x: Letters) -> Number:
    """The same of one row: backward, no row is on its way while another is computed."""
    return least(row_blocks(x) - 1, 1)


def some_layers_see_all(x: Letters) -> Number:
    """1 where not every layer has a window, or where the window holds the row."""
    return least(full_layers(x), 1)


def pair_forward(x: Letters) -> Number:
    """Bytes of a pair of blocks while what it gave is merged into what the blocks before gave, in float32.

    Two of the keys' and values' blocks, two of queries, the output, the last block's on its way, the merged one; and
    five numbers for each query and head. Approximate: all of that is there at once in every third block only.
    """
    block, heads, key_heads = block_tokens(x), group_heads(x), group_key_heads(x)
    more = x.j_h * greatest(more_blocks(x), more_groups(x))
    halves = x.j_h * (heads + 2 * key_heads) + more * (2 * heads + 2 * key_heads) + heads
    return block * (x.E * (halves * x.a // 8 + 4 * heads) + (5 + more) * 4 * heads)


def pair_backward(x: Letters) -> Number:
    """Bytes of a pair of blocks in the backward pass.

    Queries, attended values and their gradient, log-sum-exp and what the gradient of the queries is so far, and the
    next pair's; keys and values once; three gradients, those of the keys in float32 too; and the last pair's gradient
    of the queries on its way. Approximate: fewer than five blocks have not all of that at once.
    """
    block, heads, key_heads = block_tokens(x), group_heads(x), group_key_heads(x)
    more = more_row_blocks(x)
    following = greatest(more, key_head_is_shared(x))
    loaded = x.j_h * (1 + following) * (3 * heads * x.E * x.a // 8 + 4 * heads) + x.j_h * 2 * key_heads * x.E * x.a // 8
    waiting = more * (1 + 2 * x.j_h) * 4 * heads * x.E
    # Where groups share a key head, a block's whole gradient stands beside what the group before has on its way.
    leaving = x.j_h * key_head_is_shared(x) * heads
    made = (heads + leaving + 2 * key_heads) * x.E * x.a // 8 + 8 * key_heads * x.E
    return block * (loaded + waiting + made)


def stretch_forward(x: Letters) -> Number:
    """Bytes of a stretch of a layer with a window: its inputs and the next one's, its outputs and the last one's."""
    size, heads, key_heads = stretch(x) * x.E * x.a // 8, group_heads(x), group_key_heads(x)
    outputs = size * heads + 4 * stretch(x) * heads
    return x.j_h * 2 * size * (heads + 2 * key_heads) + (1 + x.j_h) * outputs


def stretch_backward(x: Letters) -> Number:
    """The same in the backward pass; gradients of keys and values in float32 too, with what is handed on."""
    size, heads, key_heads = stretch(x) * x.E * x.a // 8, group_heads(x), group_key_heads(x)
    inputs = x.j_h * 2 * (size * (3 * heads + 2 * key_heads) + 4 * stretch(x) * heads)
    made = size * (1 + x.j_h) * (heads + 2 * key_heads)
    return inputs + made + 8 * (stretch(x) + x.s) * x.E * key_heads


def group_forward(x: Letters) -> Number:
    """Bytes of a group of heads: of a pair of blocks, or of a stretch where a layer has a window."""
    return greatest(some_layers_see_all(x) * pair_forward(x), windowed(x) * stretch_forward(x))


def group_backward(x: Letters) -> Number:
    """The same in the backward pass, in which attention is computed again."""
    back = greatest(some_layers_see_all(x) * pair_backward(x), windowed(x) * stretch_backward(x))
    return greatest(back, (1 - x.k_a) * group_forward(x))


def waiting(x: Letters) -> Number:
    """Elements of the gradient of the queries that wait between two blocks of keys: of all that read the same keys."""
    return tokens(x) * x.E * greatest(group_heads(x), x.H // x.K)


def waiting_in_host(x: Letters) -> Number:
    """The same where staging is in host memory, and else nothing."""
    return x.j_h * waiting(x)


def waiting_on_card(x: Letters) -> Number:
    """The same where staging is on the card, and else nothing."""
    return (1 - x.j_h) * waiting(x)


def pairs(x: Letters) -> Number:
    """Pairs of blocks of one head: of each row each block with those up to itself."""
    return blocks(x) * (row_blocks(x) + 1) // 2


def full_layers(x: Letters) -> Number:
    """Layers without a window, or whose window holds the row."""
    return x.L - x.l * windowed(x)


def again(x: Letters) -> Number:
    """Tokens of all blocks that are brought once more, over all layers.

    Approximate: a short last block counts whole.
    """
    return x.j_h * full_layers(x) * block_tokens(x) * (pairs(x) - blocks(x))


def keys_again(x: Letters) -> Number:
    """Forward: bytes of keys and values beyond the first time, for each block of queries those before its own."""
    return again(x) * (head_inputs(x) - x.H * x.E) * x.a // 8


def keys_once_more(x: Letters) -> Number:
    """Backward: the same where attention is computed again."""
    return keys_again(x) * attention_runs_again(x) // x.L


def pairs_back_in(x: Letters) -> Number:
    """Backward: bytes of queries, attended values, their gradient and log-sum-exp beyond the first time.

    With them the gradient of the queries so far, in float32.
    """
    return again(x) * x.H * (3 * x.E * x.a // 8 + 4 + 4 * x.E)


def pairs_back_out(x: Letters) -> Number:
    """Backward: bytes of the gradient of the queries in float32, after every block of keys but the last."""
    return again(x) * 4 * x.H * x.E


def merged_bytes(x: Letters) -> Number:
    """Forward: bytes of outputs made float32 and back once, and of each further one added to those before it."""
    size = x.a // 8
    once, more = 2 * (WIDE + size) * x.E, (4 * WIDE + size) * x.E + 13 * WIDE
    return full_layers(x) * block_tokens(x) * x.H * (blocks(x) * once + (pairs(x) - blocks(x)) * more)


def merged_bytes_again(x: Letters) -> Number:
    """The same where attention is computed again."""
    return merged_bytes(x) * attention_runs_again(x) // x.L


def merged_bytes_back(x: Letters) -> Number:
    """Backward: the same of gradients, which add up in float32: those of the queries as those of the keys."""
    size = x.a // 8
    once, more = 2 * (WIDE + size), 2 * WIDE + size
    waiting = (1 - x.j_h) * 2 * WIDE  # a copy, where they wait on the card
    queries = x.H * ((pairs(x) - blocks(x)) * (more + waiting) + (blocks(x) - x.B) * once)
    keys = 2 * x.K * key_reads(x) * ((pairs(x) - blocks(x)) * more + blocks(x) * once)
    return full_layers(x) * block_tokens(x) * x.E * (queries + keys)


def pieces(x: Letters) -> Number:
    """Copies of one block of an array that is in host memory, where it lies by chunks."""
    return x.j_h * ceil_div(block_tokens(x), chunk_tokens(x))


def launches_forward(x: Letters) -> Number:
    """Kernels beyond those of whole heads: a call for each pair, its keys, and what merges it."""
    more = (pairs(x) - blocks(x)) * (8 + 2 * pieces(x)) + blocks(x) * 4
    return full_layers(x) * groups(x) * more


def launches_again(x: Letters) -> Number:
    """The same where attention is computed again."""
    return launches_forward(x) * attention_runs_again(x) // x.L


def launches_backward(x: Letters) -> Number:
    """Kernels beyond those of whole heads, of gradients."""
    more = (pairs(x) - blocks(x)) * (7 + 6 * pieces(x)) + pairs(x) * 2 + blocks(x) * (5 + x.j_h)
    return full_layers(x) * groups(x) * more

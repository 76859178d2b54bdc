"""True sizes of what the claims document saves on: terms of the ledger, with and without an optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from planner.baseline import per_layer_names
from planner.compose import compose
from planner.ledger import Device, Phase
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.tiers import TIERS
from reports.render.claims_data import Document, Found, gigabytes
from reports.render.claims_plans import Run, best_run, composed, run, situation
from reports.render.decisions import PLAIN, SPACINGS, TOKENS, backward_bytes
from reports.render.figures import CARD, MODEL

HALF = ("lora", "mixed_precision")
EXACT = (*HALF, "exact_attention")
EITHER = "rtx3090"  # a card that also attends with stored scores in 16 bits, which FP16 alone does not allow


def saved_by_layers(ids: tuple[str, ...], tokens: int) -> int:
    """Bytes that all layers save for the backward pass, none of them recomputed."""
    one = composed(ids, tokens, card=EITHER)
    return sum(one.size(name) for name in per_layer_names())


def attention_saving(document: Document, lengths: list[int], percent: float) -> Found:
    """By how much exact attention lowers what the layers save, and from which length on by so many percent."""

    def share(tokens: int) -> float:
        return 100 * (1 - saved_by_layers(EXACT, tokens) / saved_by_layers(HALF, tokens))

    told = ", ".join(f"{share(tokens):.0f} % at {tokens:,}" for tokens in lengths)
    enough = next(tokens for tokens in range(64, 2**16, 64) if share(tokens) >= percent)
    return Found(f"{told}; {percent:g} % from {enough:,} tokens on, nothing recomputed", holds="in part")


def eight_bits(document: Document) -> Found:
    """NF4 linears against linears of one byte a weight; the value is in GB."""
    one = composed((*EXACT, "nf4_weights"), 1)
    weights = one.letters.L * one.letters.P
    nf4 = one.size("weights/linear") + one.size("weights/constants")
    return Found(
        f"{gigabytes(weights - nf4)}: {gigabytes(weights)} less {gigabytes(nf4)} with scales", (weights - nf4) / 1e9
    )


def states(rank: int) -> dict[str, int]:
    """Bytes of adapters, of their gradients, and of AdamW's float32 states."""
    one = composed(("lora",), 1, rank=rank)
    return {
        "adapters": one.size("adapters/weights"),
        "gradients": sum(one.size(name) for name in one.configuration.ledger.terms if name.startswith("gradients/")),
        "optimizer": sum(one.size(name) for name in one.configuration.ledger.terms if name.startswith("optimizer/")),
    }


def offloadable(document: Document, rank: int) -> Found:
    """What leaves the card where the optimiser's states go to the host; the value is in GB."""
    size = states(rank)["optimizer"]
    text = f"all there is are {gigabytes(size)} of float32 AdamW states at rank {rank}; one card has nothing to shard"
    return Found(text, size / 1e9)


def offloaded_weights(document: Document, tokens: int) -> Found:
    """What leaves the card where the layers' weights lie in host memory, all else equal; the value is in GB."""
    base = (*HALF, "chunked_loss", "nf4_weights", "streamed")
    stay, go = (composed(ids, tokens).peak() for ids in (base, (*base, "streamed_nf4_weights")))
    text = (
        f"one card has nothing to shard; the 4-bit weights of the layers in host memory take {gigabytes(stay - go)} "
        "off the card, less what is fetched at a time, while the document's own tables leave them there"
    )
    return Found(text, (stay - go) / 1e9)


def gradients(document: Document, ranks: list[int]) -> Found:
    """Bytes of the adapters' gradients; the value is that of the first rank, in GB."""
    sizes = {rank: states(rank)["gradients"] for rank in ranks}
    told = ", ".join(f"{gigabytes(size)} at rank {rank}" for rank, size in sizes.items())
    return Found(f"all gradients together are {told}, and one card sends none", sizes[ranks[0]] / 1e9)


def no_cache(document: Document, tokens: int) -> Found:
    """The cache of keys and values in a training step; the value is in GB."""
    one = best_run(CARD)
    cache = sum(size for terms in one.phases().values() for name, size in terms.items() if "cache" in name)
    x = one.letters
    layer = 2 * tokens * x.K * x.E * x.a // 8
    text = (
        f"{gigabytes(cache)}: training keeps no cache. Keys and values of one layer are {gigabytes(layer)} at "
        f"{tokens:,} tokens, a cache of all layers would be {gigabytes(layer * x.L)}"
    )
    return Found(text, cache / 1e9)


def key_heads(document: Document) -> Found:
    """Query heads for each key head of the model."""
    model = load_model(MODEL)
    return Found(
        f"{model.heads // model.kv_heads}: {MODEL} has {model.heads} query heads and {model.kv_heads} key heads, and "
        "other heads make another model",
        model.heads / model.kv_heads,
    )


def attention_factor(document: Document, tokens: int) -> Found:
    """What exact attention leaves of the bytes that layers save with stored scores."""
    left = saved_by_layers(EXACT, tokens) / saved_by_layers(HALF, tokens)
    return Found(f"{left:.2g} of what layers save with stored scores is left at {tokens:,} tokens", left)


def most_useful(document: Document, ids: list[str], tokens: int, rank: int) -> Found:
    """Which of a set of optimisations lowers the peak most: each is taken out alone."""

    def peak(names: list[str]) -> int:
        return composed(tuple(names), tokens, rank=rank, card=EITHER).peak()

    more = {each: peak([name for name in ids if name != each]) - peak(ids) for each in ids if each != "lora"}
    most = max(more, key=lambda name: more[name])
    numbers = all_optimizations()[most].numbers
    text = f"GQA saves nothing here; at {tokens:,} tokens `{most}` (item {numbers[0]}) saves most, "
    return Found(text + gigabytes(more[most]), holds="yes" if 36 in numbers else "no")


def root_spacing() -> int:
    """Layers of a segment where there are √L segments."""
    return round(math.sqrt(load_model(MODEL).layers))


def segments_save(document: Document) -> Found:
    """√L segments against one checkpoint a layer; the value is what they save, in GB."""
    one, root = backward_bytes(1, PLAIN), backward_bytes(root_spacing(), PLAIN)
    text = (
        f"they take {gigabytes(root - one)} more at {TOKENS:,} tokens: {gigabytes(root)} for segments of "
        f"{root_spacing()} "
        f"layers, {gigabytes(one)} for one checkpoint a layer"
    )
    return Found(text, (one - root) / 1e9)


def segments_share(document: Document) -> Found:
    """What √L segments and one checkpoint a layer save of all that is saved without; the value is of the segments."""
    everything = backward_bytes(load_model(MODEL).layers, PLAIN)
    root, one = (100 * (1 - backward_bytes(layers, PLAIN) / everything) for layers in (root_spacing(), 1))
    return Found(f"{root:.0f} % for √L segments, {one:.0f} % for one checkpoint a layer", root, "in part")


@cache
def spaced(layers: int, tokens: int, rank: int) -> int:
    """Bytes of layer inputs in host memory with streamed layers, one input kept for so many of them."""
    ids = (*HALF, "chunked_loss", "streamed", *(("checkpoint_spacing",) if layers > 1 else ()))
    knobs = {"checkpoint_spacing": {"every": layers}} if layers > 1 else {}
    one = run(compose(ids, knobs, situation()), tokens, tokens, rank)
    phases = one.phases((Device.PINNED,)).values()
    return max(sum(size for name, size in terms.items() if name.startswith("activations/")) for terms in phases)


def segments_in_host(document: Document, tokens: int, rank: int) -> Found:
    """√L segments against one input a layer where layers are streamed; the value is what they save, in GB."""
    one, root = spaced(1, tokens, rank), spaced(root_spacing(), tokens, rank)
    text = (
        f"nothing of the card: layer inputs lie in host memory, where {gigabytes(one)} become {gigabytes(root)} at "
        f"{tokens:,} tokens, for one more forward pass"
    )
    return Found(text, (one - root) / 1e9, "in part")


def best_spacing(document: Document, tokens: int, rank: int) -> Found:
    """The spacing of checkpoints that takes least: of resident layers, and of streamed ones."""
    best = min(SPACINGS, key=lambda layers: backward_bytes(layers, PLAIN))
    told = "a checkpoint at every layer" if best == 1 else f"one checkpoint for {best} layers"
    layers = load_model(MODEL).layers
    sizes = {each: spaced(each, tokens, rank) for each in range(1, layers + 1)}
    least = [each for each, size in sizes.items() if size == min(sizes.values())]
    text = (
        f"√{layers} is {math.sqrt(layers):.1f}. On the card {told} takes least; of streamed layers, whose inputs lie "
        f"in host memory, one for {least[0]} to {least[-1]} of them does"
    )
    on_card, in_host = best == root_spacing(), root_spacing() in least
    return Found(text, holds="yes" if on_card and in_host else "in part" if on_card or in_host else "no")


def kept(rounded: bool, tokens: int, rank: int) -> Run:
    """Streamed layers whose kept inputs are as computed, or in four bits."""
    ids = (*HALF, "chunked_loss", "streamed")
    return composed((*ids, "checkpoint_nf4") if rounded else ids, tokens, rank=rank)


def four_bits(document: Document) -> Found:
    """16 bits over those of an NF4 element with its scales: of kept activations, and of weights."""
    whole, rounded = (kept(each, 2**18, 8).size("activations/checkpoints") for each in (False, True))
    one = composed((*EXACT, "nf4_weights"), 1)
    weights = 2 * one.letters.L * one.letters.P / (one.size("weights/linear") + one.size("weights/constants"))
    text = (
        f"{whole / rounded:.2f} for activations, whose scales are float32 for 64 elements; {weights:.2f} for weights, "
        "whose scales are nested"
    )
    return Found(text, whole / rounded)


def four_bit_checkpoints(document: Document, tokens: int, rank: int) -> Found:
    """What kept layer inputs of four bits save on the card; the value is in GB."""
    runs = [kept(each, tokens, rank) for each in (False, True)]
    saved = runs[0].peak() - runs[1].peak()
    whole, rounded = (gigabytes(one.size("activations/checkpoints")) for one in runs)
    text = (
        f"{gigabytes(saved)} of the card, since what is kept of the layers lies in host memory: there {whole} become "
        f"{rounded} at {tokens:,} tokens, and gradients are other ones"
    )
    return Found(text, saved / 1e9)


def low_rank(document: Document, rank: int) -> Found:
    """Elements of a gradient over those of its two factors, for each linear; the value is of the square ones."""
    ratios = {
        (linear.inputs, linear.outputs): linear.weights / (rank * (linear.inputs + linear.outputs))
        for linear in load_model(MODEL).linears
    }
    told = ", ".join(f"{ratio:.0f} for {inputs} × {outputs}" for (inputs, outputs), ratio in ratios.items())
    width = load_model(MODEL).width
    return Found(f"{told}: there are two factors, and {width} / {rank} counts one", next(iter(ratios.values())))


def low_rank_adapters(document: Document, rank: int) -> Found:
    """How many tiers have adapters that factors of this rank make no smaller."""
    width = load_model(MODEL).width
    none = [tier.number for tier in TIERS if width * tier.rank <= rank * (width + tier.rank)]
    return Found(
        f"nothing gets smaller in tiers {none[0]} to {none[-1]}: gradients of adapters have at most the rank "
        "of the tier",
        holds="no",
    )


def less_saved(document: Document, tokens: int, claimed: float) -> Found:
    """Saved by a layer with the activation function in one operation; the value is in percent."""
    before, after = saved_by_layers(EXACT, tokens), saved_by_layers((*EXACT, "fused_activation"), tokens)
    share = 100 * (1 - after / before)
    text = f"{share:.0f} %{', more than said,' if share > claimed else ''} less is saved by each layer with the "
    return Found(f"{text}activation function as one operation", share, "in part" if share > claimed else None)


def fused_saves(document: Document, tokens: int) -> Found:
    """Peak with and without fused activation and chunked loss; the value of both, in GB."""
    base = (*EXACT, "gradient_checkpointing", "nf4_weights")
    fused, both = (*base, "fused_activation"), (*base, "fused_activation", "chunked_loss")
    plain, one, two = (composed(ids, tokens).peak() for ids in (base, fused, both))
    chunked = composed((*base, "chunked_loss"), tokens).peak()
    text = (
        f"no such kernel exists here. At {tokens:,} tokens the loss in slices saves "
        f"{gigabytes(plain - chunked)} of the "
        f"peak, and the activation function in one operation {gigabytes(chunked - two)} of what is left"
    )
    assert one >= two
    return Found(text, (plain - two) / 1e9)


def growth(document: Document, tokens: int) -> Found:
    """By how much attention's saved bytes grow where the sequence doubles, with scores and without."""

    def attention(ids: tuple[str, ...], length: int) -> int:
        one = composed(ids, length, card=EITHER)
        return sum(one.size(name) for name in per_layer_names() if name.startswith("attention/"))

    scores, exact = (attention(ids, 2 * tokens) / attention(ids, tokens) for ids in (HALF, EXACT))
    return Found(
        f"twice the tokens take {scores:.1f} times the memory with stored scores, {exact:.1f} times with "
        "exact attention "
        "on one card, without a ring",
        holds="in part",
    )


def scores_avoided(document: Document, tokens: int, block: int) -> Found:
    """What exact attention stores beside its inputs and output, against the scores; and the document's own ratio."""
    scores, exact = (composed(ids, tokens, card=EITHER).size("attention/scores") for ids in (HALF, EXACT))
    own = 100 * (1 - block / tokens)
    return Found(
        f"1 − {block:,} / {tokens:,} is {own:.1f} %; exact attention on one card stores "
        f"{100 * (1 - exact / scores):.4f} % "
        "less than the scores already, so there is nothing left to take off",
        own,
        "in part",
    )


def widths(document: Document) -> Found:
    """The fewest bits that weights, kept activations and gradients have here."""
    one = composed((*EXACT, "nf4_weights"), 1)
    weights = 8 * (one.size("weights/linear") + one.size("weights/constants")) / (one.letters.L * one.letters.P)
    whole, rounded = (kept(each, 2**18, 8) for each in (False, True))
    name = "activations/checkpoints"
    activations = whole.letters.a * rounded.size(name) / whole.size(name)
    terms = whole.configuration.ledger.terms
    gradient = max(int(term.bits(whole.letters)) for name, term in terms.items() if name.startswith("gradients/"))
    text = (
        f"at the fewest {weights:.2f} bits a weight of the layers with scales, {activations:.2f} a kept activation, "
        f"{whole.letters.a} any other, {gradient} a gradient"
    )
    return Found(text, holds="yes" if gradient == 4 else "no")


def convolutions(document: Document) -> Found:
    """Parameters that are in no linear, embedding, head, norm or bias; the value is their share in percent."""
    model = load_model(MODEL)
    linear = model.layers * model.linear_parameters_per_layer + model.head_parameters
    rest = model.parameters - linear - model.embedding_parameters - model.small_parameters
    return Found(
        f"0 %: it chooses kernels for convolutions, and {MODEL} has none ({rest} of {model.parameters:,} "
        "parameters are in "
        "anything but linears, embedding, norms and biases)",
        float(rest),
    )


def evaluation(document: Document) -> Found:
    """The default share of validation, and what evaluation takes of the card beside training; value in percent."""
    from planner.plan import Train

    totals = {phase: sum(terms.values()) for phase, terms in best_run(CARD).phases().items()}
    share = 100 * Train().validation
    evaluating = max(totals[Phase.EVALUATE], totals[Phase.EVALUATE_LOSS])
    text = (
        f"{share:.0f} % is the default here; evaluating takes {gigabytes(evaluating)} of the card, training "
        f"{gigabytes(max(totals.values()))}"
    )
    return Found(text, share)


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        attention_saving,
        eight_bits,
        offloadable,
        offloaded_weights,
        attention_factor,
        most_useful,
        gradients,
        no_cache,
        key_heads,
        segments_save,
        segments_in_host,
        segments_share,
        best_spacing,
        four_bits,
        four_bit_checkpoints,
        low_rank,
        low_rank_adapters,
        less_saved,
        fused_saves,
        growth,
        scores_avoided,
        widths,
        convolutions,
        evaluation,
    )
}

"""The formulas of memory with nothing switched on: elements and bits of what a training step saves and passes.

Each states what autograd keeps for one layer as transformers 5.17 to 5.23 computes it, with the adapter forward of
``trainer/adapters.py``; ``tests/test_memory_on_fake_tensors.py`` counts the same on the trainer's own step.
"""

from __future__ import annotations

from planner.expert_formulas import height, over_saved_backward, over_saved_forward
from planner.symbols import Letters, Number, greatest, least


def bits_of_activation(x: Letters) -> Number:
    """Bits of an element held in the compute dtype."""
    return x.a


def bits_of_weight(x: Letters) -> Number:
    """Bits of a frozen weight that is not quantised."""
    return x.w


def float32(x: Letters) -> Number:
    """Bits of a float32 element."""
    return 32


def int64(x: Letters) -> Number:
    """Bits of a token id."""
    return 64


def one_byte(x: Letters) -> Number:
    """Bits of a byte, for terms given in bytes."""
    return 8


def tokens(x: Letters) -> Number:
    """Tokens in one micro-batch."""
    return x.B * x.S


def packed(x: Letters) -> Number:
    """1 where several documents may share a row."""
    return least(x.d_r - 1, 1)


def linear_weights(x: Letters) -> Number:
    """Weights of the linears inside the layers."""
    return x.L * x.P


def embedding(x: Letters) -> Number:
    """One row of width D for each row of the vocabulary."""
    return x.V * x.D


def positions(x: Letters) -> Number:
    """One learned row of width D for each position."""
    return x.r * x.D


def head(x: Letters) -> Number:
    """The output head, where it is not the embedding itself."""
    return x.Y * x.V * x.D


def norms_and_biases(x: Letters) -> Number:
    """Norm weights and every bias."""
    return x.N


def rotary_frequencies(x: Letters) -> Number:
    """Inverse frequencies of rotary embedding, half a head's dimensions each time: in use, and as first computed.

    Linear, YaRN and Llama 3 scaling change their values alone; so does scaling by length (``dynamic``) as
    ``trainer/rotary.py`` runs it. LongRoPE holds those for long rows besides.
    Approximate: before transformers 5.21 these and those in use are one tensor, and counted twice.
    """
    return x.O


def token_ids(x: Letters) -> Number:
    """Input ids and targets, and positions where documents share a row."""
    return (2 + packed(x)) * tokens(x)


def rotary_tables(x: Letters) -> Number:
    """Cosines and sines, shared by the layers, and by the sequences of a batch where all have the same positions."""
    return 2 * x.S * x.o * (1 + packed(x) * (x.B - 1))


def layer_inputs(x: Letters) -> Number:
    """Layer inputs that the first norm of a layer saves as they are.

    A norm in one operation saves its input. RMSNorm as transformers writes it out is computed in float32 and saves
    its float32 copy instead (term ``activations/norms``), which in float32 is the input itself: hence ``a // 32``. The
    first layer's input comes from the frozen embedding, needs no gradient, and is not saved.
    """
    return (x.A - 1) * tokens(x) * x.D * (1 - x.Q + x.Q * (x.a // 32))


def norm_copies(x: Letters) -> Number:
    """As ``norm_copies_of_layer`` for all layers, save the copy that the first norm of the first layer needs not."""
    return x.A * norm_copies_of_layer(x) - x.Q * (1 - x.a // 32) * tokens(x) * (x.D + 1)


def norm_copies_of_layer(x: Letters) -> Number:
    """Float32 tensors saved by the norms of a layer, beyond the layer's input.

    Each RMSNorm of width D that is written out saves a float32 copy and one value per token; in float32 the first
    norm's copy is the layer's input. A query/key norm saves a float32 copy of its input. A norm in one operation saves
    its values (mean and deviation, of an RMSNorm its scale) only, but its input where that is not the layer's.
    """
    wide = x.Q * (x.n - x.a // 32) * x.D + (1 - x.Q) * (x.i * x.D * x.a // 32)
    heads = x.q * (x.H + x.K) * (x.E * (32 * x.Q + x.a * (1 - x.Q)) // 32 + x.n_s)
    return tokens(x) * (wide + x.n_s * x.n + heads)


def norm_outputs(x: Letters) -> Number:
    """Outputs of the norms that linears read, saved as the input of their adapters."""
    return x.A * tokens(x) * x.m * x.D


def adapter_inner(x: Letters) -> Number:
    """Each adapter's inner activation, of width R."""
    return x.A * tokens(x) * x.I * x.R


def mlp_saved(x: Letters) -> Number:
    """Tensors of width F that the MLP saves: ``f`` of them (gated 4; plain with gelu_new 5; plain 2)."""
    return x.A * tokens(x) * x.f * x.F


def attention_inputs_expanded(x: Letters) -> Number:
    """Query, and key and value repeated for every query head; one head alone is repeated without a copy.

    Where nothing is repeated, value is what its linear gave, with what that keeps alive.
    """
    repeated = x.K + least(x.K - 1, 1) * (x.H - x.K)
    return x.A * tokens(x) * ((x.H + 2 * repeated) * x.E + kept_with_value(x))


def kept_with_value(x: Letters) -> Number:
    """Elements of a token that stay since value is in the same tensor: query and key, of a single row.

    Heads of several rows do not lie evenly apart, so their product with the scores copies value and keeps the copy.
    """
    return (x.K // x.H) * x.v * (1 - least(x.B - 1, 1))


def attention_output(x: Letters) -> Number:
    """What attention gives, saved as the input of the output projection."""
    return x.A * tokens(x) * x.H * x.E


def attention_by_document(x: Letters) -> Number:
    """What attention gives for each document by itself, before it is joined: saved by its kernel, where there is one.

    Documents share a row as far as they have no more tokens than are trained. In rows shorter than the longest, what
    attention saves of each token is less by as many tokens.
    """
    shorter = (x.S - x.T) * (2 * x.H + 2 * x.K) * x.E
    return (1 - x.e) * packed(x) * x.A * x.B * greatest(x.T * x.H * x.E - shorter, 0)


def eager_scores(x: Letters) -> Number:
    """Softmax of the scores, for every pair of tokens."""
    return x.A * x.B * x.H * x.S**2


def scores_bits(x: Letters) -> Number:
    """Softmax in float32 plus its copy in the compute dtype, which in float32 is the same tensor; a cap's tanh.

    Where the softmax is computed in the compute dtype, it is that alone.
    """
    return (1 - x.u) * (64 - x.a) + x.u * x.a + x.c * x.a


def scores(x: Letters) -> Number:
    """One number for each head and pair of tokens."""
    return x.B * x.H * x.S**2


def masks(x: Letters) -> Number:
    """A number for each pair of tokens."""
    return x.k * x.B * x.S**2


def eager_backward_bytes(x: Letters) -> Number:
    """Bytes alive while a layer's softmax is differentiated, as far as they stand above its MLP's height.

    Beside the saved float32 softmax: its gradient, their product, the gradient of the scores in float32 (in float16
    where they are) and, in 16 bits, nothing of the saved copy any more; all three in the compute dtype where the
    softmax is. The layer's MLP is done by then, and so are
    the norms behind attention: what they saved is gone, and value with what it kept alive.
    """
    working = (1 - x.p) * backward_bytes(x) + x.p * layer_backward_bytes(x)
    norms = x.i * x.D * (x.Q * 32 + (1 - x.Q) * x.a) + (x.m - 1) * x.D * x.a
    gone = tokens(x) * ((x.f * x.F + x.d * x.D) * x.a + norms + kept_with_value(x) * x.a) // 8 + working
    wide = (1 - x.u) * (64 - 16 * x.h + x.a) + x.u * 3 * x.a
    return greatest(wide * scores(x) // 8 - gone, 0)


def eager_forward_bytes(x: Letters) -> Number:
    """Bytes alive while the last layer's softmax is computed, above the height of its MLP.

    With every layer's tensors saved, what there is beside the softmax and its 16-bit copy, while what is saved after it
    is still to come: the masked scores in float16, in bfloat16 a float32 copy before there is any 16-bit one. It counts
    as far as it stands above the end of the pass. With layers recomputed, as without autograd. GPT-OSS puts a sink
    beside the scores, which makes one tensor more.
    """
    beside = (1 - x.u) * (32 - 16 * x.h) + x.u * x.a * (1 + x.b)
    saved = (beside * scores(x) - x.f * x.F * tokens(x) * x.a) // 8 - forward_bytes(x)
    return (1 - x.p) * greatest(saved, 0) + x.p * eager_alone_bytes(x)


def eager_alone_bytes(x: Letters) -> Number:
    """Bytes alive while the softmax of a layer is computed without autograd, above the height of its MLP.

    Masked scores, their float32 copy and the softmax, or in float32 two of the three; float16 needs no such copy, but
    the 16-bit one of the softmax while the scores are still there. Query, key, value and what was repeated of them. A
    layer holds what attention gave beside its output, the softmax, until it is through with its MLP.
    """
    heads = (3 * x.H + 2 * x.K * (1 - least(x.r, 1))) * x.E  # nothing turns them where positions are learned
    alive = (1 - x.u) * (96 - x.a - 16 * x.h) + x.u * (2 + x.b) * x.a
    return greatest(alive * scores(x) + (heads - height(x)) * tokens(x) * x.a, x.a * scores(x)) // 8


def incoming_gradient(x: Letters) -> Number:
    """The gradient that comes into a layer from above, alive through its backward pass."""
    return tokens(x) * x.D


def mlp_gradients(x: Letters) -> Number:
    """Gradients alive at the height of a layer's backward pass, in MLP or experts; elements of the compute dtype."""
    taken = least(x.d, 1)
    return tokens(x) * ((1 - taken) * mlp_gradient_tensors(x) * x.F + taken * over_saved_backward(x))


def mlp_gradient_tensors(x: Letters) -> Number:
    """Tensors of width F at the height of an MLP's backward pass, beyond what is saved.

    The input of the last linear gets its gradient from adapter and base weight, the second added to the first in place,
    while what the linear saved is gone: one more than what is saved. There the height is where an activation function
    in one operation stands alone, which saves no more than two tensors (its own, and the last linear's input). A
    product, of gate and up projection or inside a function written out, has two factors with a gradient each: two more.
    Of a compiled layer's plain MLP what adapter and base weight give are two tensors until the function's own kernel
    adds them, and what the linear saved is still there: three more, of which a step compiled for the CPU takes less.
    """
    product = least(greatest(x.f - 2, 0), 1)
    return 1 + product + x.k_c * 2 * (1 - product)


def experts_again(x: Letters) -> Number:
    """Elements at the height of the experts where the backward pass recomputes them; in 16 bits their input as well."""
    return tokens(x) * least(x.d, 1) * (over_saved_forward(x) + x.D * (1 - x.a // 32))


def layer_backward_bytes(x: Letters) -> Number:
    """Bytes alive at the height of one layer's backward pass beyond what is saved and the incoming gradient.

    The MLP's gradients; where a norm comes after the MLP, what it saved is gone by then, and its own gradient may
    stand higher: five float32 tensors of width D beside its saved copy.
    """
    normed = least(x.z, 1)
    mlp = greatest(mlp_gradients(x), x.p * experts_again(x)) * x.a // 8
    return greatest(mlp - normed * 4 * tokens(x) * (x.D + 1), normed * 20 * tokens(x) * x.D)


def backward_bytes(x: Letters) -> Number:
    """The same with every layer's tensors saved.

    There is one more candidate, before the last layer: the final RMSNorm, whose gradient takes six float32 tensors of
    width D, its saved copy among them.
    """
    final_norm = x.Q * tokens(x) * x.D * (24 - x.a // 8)
    return greatest(layer_backward_bytes(x), final_norm)


def forward_working(x: Letters) -> Number:
    """Tensors alive at the height of one layer run without autograd: those of the MLP, and two of width D.

    Where positions are learned, embedded tokens and positions stay beside their sum as long as the layers run.
    """
    return tokens(x) * (height(x) + 2 * x.D * (1 + least(x.r, 1)))


def evaluation_working(x: Letters) -> Number:
    """As the forward pass, and two that nothing else keeps there: the layer's input and the embedded tokens."""
    return forward_working(x) + 2 * tokens(x) * x.D


def forward_bytes(x: Letters) -> Number:
    """Bytes alive at the end of the forward pass beyond what is saved.

    Four float32 tensors of width D where the final norm is an RMSNorm; else the last residual sums, three tensors
    of width D in the compute dtype, and two more where attention and MLP are added at once, or where embedded tokens
    and positions stay beside them; or the experts of the last layer, and four such tensors.
    """
    sums = 5 - 2 * least(x.i, 1) * (1 - least(x.r, 1))
    last = tokens(x) * least(x.d, 1) * (over_saved_forward(x) + 4 * x.D) * x.a // 8
    return greatest(tokens(x) * x.D * (16 * x.Q + sums * (1 - x.Q) * (x.a // 8)), last)


def final_hidden(x: Letters) -> Number:
    """Input of the final norm, where the norm saves it as it is.

    Its output is gone when the stock loss stands highest, in its backward pass: the frozen head saves none of it.
    """
    return tokens(x) * x.D * (1 - x.Q + x.Q * (x.a // 32))


def final_norm_copy(x: Letters) -> Number:
    """The final RMSNorm's float32 copy of its input (16-bit only), and its deviation."""
    return x.Q * tokens(x) * (x.D * (1 - x.a // 32) + 1)


def stock_logits(x: Letters) -> Number:
    """Logits of every token, trained or not."""
    return tokens(x) * x.V


def stock_logits_bits(x: Letters) -> Number:
    """Logits, their float32 copy, log-softmax and its gradient: three float32 tensors beside none or one 16-bit.

    The float32 copy, the log-softmax and the gradient live at once; the 16-bit logits are gone by then. In
    float32 the copy is the logits, and shifted labels avoid a second one. Where logits are capped, tanh saves what it
    gives.
    """
    return 96 + x.t * x.a


def loading_in_host(x: Letters) -> Number:
    """Bytes of host memory while a GGUF file is loaded: all weights, and two float32 copies of the largest tensor.

    transformers dequantises tensor by tensor on the CPU; the embedding is the largest. Safetensors are mapped, and go
    to the card from there. Approximate: 729 MiB for SmolLM2-135M in float32 and 473 in bfloat16, where 670 and 453 were
    seen.
    """
    weights = linear_weights(x) + embedding(x) + head(x) + norms_and_biases(x)  # no GGUF file has experts here
    return x.W * (weights * x.w // 8) + x.G * 8 * embedding(x)


def workspace(x: Letters) -> Number:
    """What cuBLAS keeps: one workspace for the thread of the forward pass, one for autograd's own thread."""
    return 2 * x.Z

"""Decoder layers compiled by torch.compile, each for itself; layers that are alike share what was compiled.

A layer is compiled whole: norms, products, adapters, rotary embedding and attention in one graph forward and one
backward, by the rule of torch's min-cut partitioner for what is kept. The sequence is a dynamic dimension, so that rows
of any length run the same code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from planner.errors import PlanError
from trainer.layers import layers_of
from trainer.norms import is_written_out

BACKEND = "inductor"
GRAPHS = 32
"""Graphs that layers of one class may come to: with a gradient of the input and without, with autograd and without, for
one row and for several, and for each kind of layer (without rotary embedding, say)."""


def compile_layers(model: PreTrainedModel) -> None:
    """Let the forward of each layer, and of a last norm that is written out, be compiled when it first runs."""
    # Loaded here, since they take seconds that no other run needs.
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor
    from torch.utils._triton import has_triton

    if model.device.type == "cuda" and not has_triton():
        why = "torch.compile writes kernels for a card in Triton, which is not installed."
        raise PlanError("compiled_layers", why, "pip install triton, or --without compiled_layers.")
    torch._dynamo.reset()  # graphs of an earlier model of this process would count, and its tensors stay
    dynamo.recompile_limit = max(GRAPHS, dynamo.recompile_limit)
    # Workers of the compiler would be processes with a torch of their own each, in memory that no plan counts.
    inductor.compile_threads = 1
    decoder, layers = model.get_decoder(), layers_of(model)
    kinds = {type(layer) for layer in layers}
    # transformers puts checkpoints of its own around a layer's forward, which is what is compiled.
    compiled = {kind: _compiled(inspect.unwrap(kind.forward)) for kind in kinds}
    for layer in layers:
        layer.forward = _Forward(layer, partial(compiled[type(layer)], layer))  # type: ignore[assignment]
    for module in decoder.children():
        if is_written_out(module):
            module.forward = _Forward(module, _compiled(module.forward))  # type: ignore[assignment]


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(forward, backend=BACKEND, fullgraph=True)
    return made


class _Forward:
    """The forward of one layer, or of a norm; refuses where the compiler gives up."""

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self._module, self._compiled = module, compiled

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``hidden`` is ``[B, S, D]``; beside it whatever transformers hands a layer."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor.exc import InductorError

        rows, tokens = hidden.shape[:2]
        for each in tree_leaves((hidden, args, kwargs)):
            if isinstance(each, Tensor):
                _any_size(each, rows, tokens)
        try:
            return self._compiled(hidden, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit, InductorError) as error:
            if (
                short := _out_of_memory(error)
            ) is not None:  # while kernels were tried out; who runs this knows what to do
                raise short from error
            told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if isinstance(error, FailOnRecompileLimitHit):
                told = f"its layers differ, and come to more than {GRAPHS} graphs"
            why = f"torch.compile cannot compile {type(self._module).__name__} here: {told.removesuffix('.')}."
            raise PlanError("compiled_layers", why, "--without compiled_layers runs it as it is.") from error


def _out_of_memory(error: BaseException) -> torch.OutOfMemoryError | None:
    """What the compiler met, if that was too little memory."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    return cause


def _any_size(tensor: Tensor, rows: int, tokens: int) -> None:
    """Say that the sequence, the second dimension or the only one, may have any length in the next batch.

    By its place: a width may be as long as the sequence, and is the same in every batch. There may be more rows or
    fewer as well, as long as there are several.
    """
    from torch._dynamo import maybe_mark_dynamic

    place = min(tensor.dim() - 1, 1)
    if tensor.dim() and tensor.shape[place] == tokens:
        maybe_mark_dynamic(tensor, place)
    if place == 1 and rows > 1 and tensor.shape[0] == rows:
        maybe_mark_dynamic(tensor, 0)

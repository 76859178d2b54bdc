"""The trainer's own step on fake tensors: real widths and lengths, every byte counted, nothing computed.

It is what `plan validate` does where there is no card, and what the formulas are tested against.

The model is built by `trainer.session`, as in training, on a CPU that holds no data. What a card has and a CPU lacks
stands aside: any exact kernel is the CPU's flash kernel, or with a window the flash kernel's operator, which save the
same tensors, and pinned buffers are counted as the host's. Kernel workspaces and the allocator's rounding are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from planner.families import FAMILIES
from planner.ledger import Phase
from planner.plan import Plan
from trainer import attention, session
from trainer.block_attention import Blocks
from trainer.counting import TensorBytes
from trainer.data import synthetic_batch
from trainer.four_bit import FourBit
from trainer.host_memory import Arena
from trainer.kernel_ops import Flash
from trainer.layers import mlp_width
from trainer.measure import resident_tensors
from trainer.norms import is_written_out
from trainer.streamed.disk_file import UnderWay
from trainer.streamed.kernels import KERNELS

CPU = torch.device("cpu")


class _OnCard(TensorBytes):
    """Counts what a card would hold: tensors that lie elsewhere are known from the start and weigh nothing."""

    def __init__(self, resident: Iterable[Tensor], elsewhere: Iterable[Tensor]) -> None:
        super().__init__(resident)
        held = self.live
        for tensor in elsewhere:
            self._see(tensor)
        self.live, self.peaks = held, type(self.peaks)(int)


@dataclass(frozen=True)
class Counted:
    """What a step takes.

    Attributes:
        phases: peak bytes on the card, by phase.
        resident: bytes that stay there from step to step.
        weights: bytes of weights that are in the host; ``pinned``: of pinned buffers, those weights among them.
        layers: how many layers were run.
    """

    phases: dict[str, int]
    resident: int
    weights: int
    pinned: int
    layers: int


def counted(plan: Plan, layers: int | None = None) -> Counted:
    """Forward, loss, backward and evaluation of a plan's largest batch.

    Args:
        layers: of a streamed model only so many, from the first; each takes the same. All where it is None.
    """
    with nothing_real() as on_card:
        built = session.build(plan)
        vocab = built.base.config.vocab_size
        batch = synthetic_batch(plan.train.batch, plan.total_tokens, plan.target, vocab, 0, built.most_documents)
        make_state(built)
        elsewhere = [array for arena in built.arenas for array in arena.held]
        stays = [*resident_tensors(built), *on_card, batch.inputs, batch.targets]
        with _OnCard(stays, elsewhere) as live, built.first_layers(layers or plan.model.layers):
            resident = live.live
            live.mark(Phase.FORWARD)
            loss = built.loss(batch, torch.tensor(float(batch.trained)), live.mark)
            loss.backward()
            del loss
            with torch.no_grad():
                live.mark(Phase.EVALUATE)
                loss = built.loss(batch, torch.ones(()), live.mark)
                del loss
            live.mark("between")
    in_host = built.weights.host.bytes if built.weights.host is not None else 0
    pinned = sum(arena.bytes for arena in built.arenas if arena.away)
    ran = min(layers or plan.model.layers, plan.model.layers) if built.streamed is not None else plan.model.layers
    return Counted({str(name): size for name, size in live.peaks.items()}, resident, in_host, pinned, ran)


_fill_qmap = Optimizer8bit.fill_qmap


def _make_tables(optimizer: Optimizer8bit) -> None:
    """The tables of an eight-bit optimiser, made from real numbers."""
    with unset_fake_temporarily():
        _fill_qmap(optimizer)


def make_state(built: session.BuiltRun) -> None:
    """The optimiser's state as its first step makes it."""
    optimizer: Any = built.optimizer
    if isinstance(optimizer, torch.optim.AdamW):
        for parameter in built.trained:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
        return
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, index)


UNSEEN = ("runtime/workspace", "attention/workspace")
"""Terms that no tensor of the step holds: what the matrix library and attention kernels take for themselves."""


def predicted(plan: Plan) -> dict[str, int]:
    """The plan's bytes by phase, without what is not seen here."""
    return {
        phase: sum(size for name, size in terms.items() if name not in UNSEEN)
        for phase, terms in plan.memory.gpu.phases.items()
    }


class _FourBitLinear(nn.Linear):
    """What ``bitsandbytes.nn.Linear4bit`` does, around the same functions; its own parameter class takes no fakes."""

    def __init__(self, linear: nn.Linear | Conv1D, four_bit: FourBit, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        weight = linear.weight.data.t().contiguous() if isinstance(linear, Conv1D) else linear.weight.data
        self.out_features, self.in_features = weight.shape
        self._dtype = dtype
        packed, self._state = quantize_4bit(
            weight, blocksize=64, compress_statistics=four_bit.double_quantization, quant_type="nf4"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.quant_state = self._state  # type: ignore[attr-defined]
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.data.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return matmul_4bit(x.to(self._dtype), self.weight.t(), bias=self.bias, quant_state=self._state).to(x.dtype)


class _Softmax(torch.autograd.Function):
    """Softmax as torch's CUDA kernel takes memory (aten/native/cuda/SoftMax.cu): backward makes a product besides."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = scores.dtype
        # Only float16 is read as it is, or what stays in its own type.
        as_it_is = scores.dtype in (torch.float16, dtype)
        weights = torch.empty_like(scores if as_it_is else scores.float(), dtype=dtype)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        product = gradients[0] * weights
        wide = torch.empty_like(product, dtype=torch.float16 if ctx.dtype == torch.float16 else weights.dtype)
        del product
        return wide.to(ctx.dtype), None


class _RmsNorm(torch.autograd.Function):
    """RMSNorm as torch's CUDA kernel takes memory: its input and a number for each row are saved."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows, rows.new_empty(rows.shape[:-1], dtype=torch.float32))
        return rows.clone()  # what it reads and writes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] + ctx.saved_tensors[0]


class _Between(torch.autograd.Function):
    """What a compiled layer has between the linears of its MLP, as a kernel of its own: its inputs are saved.

    Backward, a plain MLP has two tensors more at once: what adapter and weight give lies apart until this kernel adds
    them, and what the last linear read is still there.
    """

    @staticmethod
    def forward(ctx: Any, width: int, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.beside = 2 if len(inputs) == 1 and inputs[0].shape[-1] == width else 0
        return inputs[0].new_empty(*inputs[0].shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        beside = [torch.empty_like(gradients[0]) for _ in range(ctx.beside)]
        given = tuple(torch.empty_like(each) for each in ctx.saved_tensors)
        del beside
        return None, *given


def _as_compiled(model: PreTrainedModel) -> None:
    """Let layers take the memory that compiled ones take: norms, and what lies between linears, are one kernel each."""
    family = FAMILIES[model.config.model_type]
    for module in model.modules():
        if is_written_out(module):
            module.forward = _RmsNorm.apply  # type: ignore[assignment]
        elif family.mlp and all(hasattr(module, name) for name in family.mlp):
            *first, last = (getattr(module, name) for name in family.mlp)

            def forward(hidden: Tensor, first: list[nn.Module] = first, last: nn.Module = last) -> Tensor:
                width = mlp_width(model.config)
                made: Tensor = last(_Between.apply(width, *(each(hidden) for each in first)))
                return made

            module.forward = forward  # type: ignore[assignment]


class _Grouped(torch.autograd.Function):
    """Grouped products as torch has them for a card; its own stand-in for fake tensors takes bfloat16 alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return rows.new_empty(len(rows), weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0].new_empty(len(gradients[0]), weight.shape[-2]), None


class _NoDisk:
    """A file on a disk that nothing is written to or read from, and that takes no room."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size

    def write(self, values: Tensor, offset: int, after: Callable[[], None]) -> UnderWay:
        """Done at once."""
        return []

    def read(self, values: Tensor, offset: int, after: Callable[[], None]) -> UnderWay:
        """Done at once."""
        return []

    def close(self) -> None:
        """There is nothing to close."""


def _softmax_of_card(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    if scores.dim() < 4:  # a router's
        return torch.softmax(scores, dim, dtype)
    assert dim == -1 and dtype in (torch.float32, scores.dtype, None)
    return _Softmax.apply(scores, dtype or scores.dtype)


@contextmanager
def nothing_real(
    taking: Callable[[bool], AbstractContextManager[object]] = nullcontext,
) -> Iterator[list[Tensor]]:
    """Meanwhile nothing is computed; gives the arrays that arenas take of the card.

    Args:
        taking: entered while an arena takes an array, and told whether that is away from the card.
    """
    on_card: list[Tensor] = []

    def taken(arena: Arena, elements: int, dtype: torch.dtype) -> Tensor:
        with taking(arena.away):
            array = torch.empty(elements, dtype=dtype)
        arena.bytes += elements * dtype.itemsize
        arena.held.append(array)
        if not arena.away:
            on_card.append(array)
        return array

    quantize_4bit(torch.zeros(64, 64), compress_statistics=True, quant_type="nf4")  # makes tables from real numbers
    kernels = dict.fromkeys(attention.KERNELS, SDPBackend.FLASH_ATTENTION)
    replaced: dict[str, Any] = {
        "trainer.session.take_device": lambda plan: CPU,
        "trainer.session.compile_layers": _as_compiled,
        "trainer.attention.KERNELS": kernels,
        "trainer.attention.KERNEL_OPS": {name: Flash() for name in kernels} | {attention.BLOCKS: Blocks()},
        "trainer.streamed.build.KERNELS": dict.fromkeys(KERNELS, KERNELS["cpu"]),
        "trainer.host_memory.Arena.take": taken,
        "trainer.streamed.shelf.DiskFile": _NoDisk,
        # Fake tensors cannot be swapped for others in place, and are where they belong from the start.
        "torch.nn.Module.to": lambda module, *_, **__: module,
        "trainer.random_weights.quantised": lambda linear, four_bit, dtype, _: _FourBitLinear(linear, four_bit, dtype),
        "bitsandbytes.optim.optimizer.Optimizer8bit.fill_qmap": _make_tables,
        "torch.nn.functional.softmax": _softmax_of_card,
        "torch.nn.functional.rms_norm": lambda rows, shape, weight, epsilon: _RmsNorm.apply(rows),
        "torch.nn.functional.grouped_mm": lambda rows, weight, offs: _Grouped.apply(rows, weight),
        # Nothing is computed, so there is nothing to look at.
        "trainer.streamed.finite._first": lambda *_: None,
        # Fake tensors look like tracing to transformers, which would then build masks for packed rows.
        "transformers.masking_utils.find_packed_sequence_indices": lambda *_: None,
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        patches = [patch(name, value) for name, value in replaced.items()]
        for each in patches:
            each.start()
        try:
            yield on_card
        finally:
            for each in patches:
                each.stop()

"""The devices that `plan measure` measures: this machine's CPU, and its card through CUDA."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trainer.attention import KERNELS
from trainer.benchmark import NORM_WIDTH, Call, TooLarge

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BACKENDS = {**KERNELS, "eager": SDPBackend.MATH}
_HEADS = 8


class TorchDevice:
    """One of torch's devices; see `trainer.benchmark.Device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self.has_link = self._cuda
        self.kernels = ("cudnn", "flash", "efficient", "eager") if self._cuda else ("cpu", "eager")

    def matmul(self, dtype: str, size: int) -> Call | None:
        """float32 without, tf32 with the matrix units that cut it short; a CPU has no tf32."""
        if dtype == "tf32" and not (self._cuda and torch.cuda.get_device_capability(self._device) >= (8, 0)):
            return None
        if self._refuses(dtype):
            return None
        first, second = (self._random((size, size), dtype) for _ in range(2))
        out = _taken(lambda: torch.empty_like(first))

        def multiply() -> None:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
            torch.mm(first, second, out=out)
            torch.backends.cuda.matmul.allow_tf32 = before

        return self._able(multiply)

    def attention(self, kernel: str, dtype: str, head_size: int, tokens: int) -> tuple[Call, int] | None:
        """Self-attention of one sequence; eager attention, which holds all scores, of short ones only."""
        if self._refuses(dtype) or (kernel == "eager" and tokens > 2048):
            return None
        if not self._cuda and dtype != "fp32":
            return None  # what trains on a CPU trains in float32
        shape = (1, _HEADS, tokens, head_size)
        query, key, value = (self._random(shape, dtype).requires_grad_() for _ in range(3))
        gradient = self._random(shape, dtype)

        def attend() -> None:
            with sdpa_kernel(_BACKENDS[kernel]):
                out = scaled_dot_product_attention(query, key, value, is_causal=True)
                torch.autograd.grad(out, (query, key, value), gradient)

        able = self._able(attend)
        return (able, _HEADS) if able is not None else None

    def norm(self, tokens: int) -> tuple[Call, int] | None:
        """RMSNorm as models write it out; on a card of 16-bit values, computed in float32 and cast back."""
        values = self._random((tokens, NORM_WIDTH), "fp16" if self._cuda else "fp32")
        weight = _taken(lambda: torch.ones_like(values[0]))

        def run() -> None:
            wide = values.float()
            scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            torch.mul(weight, (wide * scale).to(values.dtype))

        # Squares read and written, read for their mean; the product with the scale; the one with the weight.
        moved = 8 + 4 + 8 + 2 * values.itemsize + (2 * (4 + values.itemsize) if self._cuda else 0)
        able = self._able(run)
        return (able, tokens * NORM_WIDTH * moved) if able is not None else None

    def link(self, way: str, size: int) -> Call | None:
        """On streams of their own, as checkpoints are copied."""
        if not self._cuda:
            return None
        there = [self._buffer(size) for _ in range(2)]
        try:
            here = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        except RuntimeError as error:  # the host has no more memory to pin
            raise TooLarge from error
        streams = [torch.cuda.Stream(self._device) for _ in range(2)]

        def run() -> None:
            if way in ("to_host", "both_ways"):
                with torch.cuda.stream(streams[0]):
                    here[0].copy_(there[0], non_blocking=True)
            if way in ("to_device", "both_ways"):
                with torch.cuda.stream(streams[1]):
                    there[1].copy_(here[1], non_blocking=True)

        return self._able(run)

    def pin(self, size: int) -> Call | None:
        """As `trainer.host_store` does it: mapped at its exact size, then registered with the driver."""
        if not self._cuda:
            return None

        def run() -> None:
            try:
                pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise TooLarge from error
            buffer = torch.frombuffer(pages, dtype=torch.uint8)
            code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
            if code != 0:
                raise TooLarge
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

        return self._able(run)

    def wait(self) -> None:
        """What was launched on any stream is done."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def _refuses(self, dtype: str) -> bool:
        """bf16 is emulated before Ampere, so a rate would tell of nothing; nobody trains in fp16 on a CPU."""
        if self._cuda:
            return dtype == "bf16" and torch.cuda.get_device_capability(self._device) < (8, 0)
        return dtype == "fp16"

    def _random(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return _taken(lambda: torch.randn(shape, device=self._device, dtype=_DTYPES[dtype]))

    def _buffer(self, size: int) -> Tensor:
        return _taken(lambda: torch.zeros(size, dtype=torch.uint8, device=self._device))

    def _able(self, call: Call) -> Call | None:
        """The call, once it has been seen to work; None where the device refuses it (no such kernel, no such dtype)."""
        try:
            call()
            self.wait()
        except RuntimeError as error:
            if _no_memory(error):
                raise TooLarge from error
            return None
        return call


def _taken(make: Callable[[], Tensor]) -> Tensor:
    try:
        return make()
    except RuntimeError as error:
        if _no_memory(error):
            raise TooLarge from error
        raise


def _no_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""What `plan measure` found on a machine: rates that were reached there, as a block of the card's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from planner.errors import PlanError
from planner.units import parse_bandwidth, parse_bytes, parse_flops

DTYPES = ("fp32", "tf32", "fp16", "bf16")


@dataclass(frozen=True)
class Measured:
    """Rates reached on the machine, dense FLOP/s and bytes/s; what was not measured is None or missing.

    Attributes:
        source: with what it was measured.
        machine: which machine it was, as `planner.machine.machine_name` tells it.
        file: the profile it was read from; empty as long as it is in none.
        matmul: products of square matrices as wide as a layer, one after the other, by dtype.
        attention: forward and backward of causal attention together, each pair of tokens counted once, by kernel,
            dtype and head size.
        memory: bytes read and written by a norm computed op by op over some thousand tokens.
        to_host: pinned copies from the card; ``to_device`` the other way; ``both_ways`` the sum of both at once.
        pinning: bytes of host memory pinned in a second.
        kernels_per_second: launched by the host in a small model's step, as formulas count them (`planner.launches`).
        disk: bytes written, or read, in a second; ``disk_folder``: of which folder's disk.
        host_memory: bytes of host memory that the process might use.
    """

    source: str
    machine: str
    matmul: Mapping[str, float] = field(default_factory=dict, hash=False)
    attention: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict, hash=False)
    memory: float | None = None
    to_host: float | None = None
    to_device: float | None = None
    both_ways: float | None = None
    pinning: float | None = None
    kernels_per_second: float | None = None
    disk: float | None = None
    disk_folder: str = ""
    host_memory: int | None = None
    file: str = field(default="", compare=False)

    def of_the_card(self) -> Measured:
        """Without what the host and the link to it have a part in: what is left where the card is put elsewhere."""
        card = replace(self, to_host=None, to_device=None, both_ways=None, pinning=None)
        return replace(card, kernels_per_second=None, disk=None, disk_folder="", host_memory=None)

    def rates(self, kernel: str, dtype: str, head_size: int) -> dict[str, float | None]:
        """Rates by kind of work, None where it was not measured (`planner.rates.KINDS`)."""
        return {
            "linear": self.matmul.get(dtype),
            "attention": self.attention_rate(kernel, dtype, head_size),
            "memory": self.memory,
            "to_host": self.to_host,
            "to_device": self.to_device,
            "disk": self.disk,
            "launch": self.kernels_per_second,
        }

    def attention_rate(self, kernel: str, dtype: str, head_size: int) -> float | None:
        """FLOP/s of attention. Approximate: between measured head sizes, that of the next smaller one."""
        sizes = self.attention.get(kernel, {}).get(dtype, {})
        below = [size for size in sizes if size <= head_size]
        return sizes[max(below)] if below else sizes[min(sizes)] if sizes else None


# --- The block in a card's file ---------------------------------------------------------------------------


def _within(most: float) -> AfterValidator:
    """Catches slips of the pen: no machine is beyond ``most``."""

    def check(value: float) -> float:
        if not 0 < value <= most:
            raise PlanError(f"{value:g}", "was measured on no machine.", f"It lies between 0 and {most:g}.")
        return value

    return AfterValidator(check)


def _text(read: Callable[[str], float]) -> BeforeValidator:
    return BeforeValidator(read)


_Flops = Annotated[float, _text(parse_flops), _within(1e18)]
_Bandwidth = Annotated[float, _text(parse_bandwidth), _within(1e15)]
_PerSecond = Annotated[float, _within(1e9)]
_Size = Annotated[int, _text(parse_bytes), _within(2.0**60)]
_Dtype = Literal["fp32", "tf32", "fp16", "bf16"]
_Kernel = Literal["cudnn", "flash", "efficient", "eager", "cpu"]


class MeasuredBlock(BaseModel):
    """``measured:`` as it is written in a file; every quantity but the first two may be left out."""

    model_config = ConfigDict(extra="forbid")
    source: Annotated[str, Field(min_length=1)]
    machine: Annotated[str, Field(min_length=1)]
    matmul: dict[_Dtype, _Flops] = {}
    attention: dict[_Kernel, dict[_Dtype, dict[Annotated[int, Field(ge=1, le=4096)], _Flops]]] = {}
    memory: _Bandwidth | None = None
    to_host: _Bandwidth | None = None
    to_device: _Bandwidth | None = None
    both_ways: _Bandwidth | None = None
    pinning: _Bandwidth | None = None
    kernels_per_second: _PerSecond | None = None
    disk: _Bandwidth | None = None
    disk_folder: str = ""
    host_memory: _Size | None = None

    def measured(self, file: str) -> Measured:
        """The rates, with the file they were read from."""
        given: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        return Measured(**given, file=file)

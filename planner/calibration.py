"""Constants that no formula gives, read from ``calibration.yaml`` with their sources."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).with_name("calibration.yaml")


@dataclass(frozen=True)
class Calibration:
    """The constants, as the file gives them."""

    document: dict[str, Any]
    sha256: str

    def workspace_bytes(self, capability: tuple[int, int] | None) -> int:
        """cuBLAS workspace of a card; none on the CPU."""
        return 0 if capability is None else int(_of_card(self.document["workspace_bytes"], capability)["value"])

    def reserve_bytes(self, expected: Any, kind: str) -> Any:
        """Bound on what is taken above the expected peak: what the allocator reserves, and what no term holds."""
        reserve = self.document["reserve"][kind]
        per_thousand = round(reserve["fraction"]["value"] * 1000)
        return expected * per_thousand // 1000 + int(reserve["bytes"]["value"])

    def host_process_bytes(self, kind: str) -> int:
        """Anonymous host memory of the training process beyond the ledger's terms."""
        return int(self.document["host_process_bytes"][kind]["value"])

    def host_process_expected(self, kind: str, executor: str) -> int:
        """The same as expected; on the CPU, where nothing was measured, the bound."""
        if kind == "cpu":
            return self.host_process_bytes(kind)
        return int(self.document["host_process_expected"][executor]["value"])

    def attention_share(
        self, kernel: str, capability: tuple[int, int] | None, dtype: str, head_size: int
    ) -> dict[str, Any]:
        """Share of the peak rate that an attention kernel reaches, with its ``basis`` and ``source``."""
        rows = [
            row
            for row in self.document["efficiency"]["attention"][kernel]
            if head_size >= row.get("least_head_size", 0) and row.get("dtype", dtype) == dtype
        ]
        return _of_card(rows, capability or (0, 0))

    def share(self, resource: str) -> dict[str, Any]:
        """The share of ``linear``, ``link`` or ``memory`` with its ``basis`` and ``source``."""
        return dict(self.document["efficiency"][resource])

    def launch_seconds(self) -> float:
        """Time that the host takes to launch one kernel: Python, the libraries, and the driver."""
        return float(self.document["launch_seconds"]["value"])

    def disk_rate(self) -> float:
        """Bytes a second that are written to a disk, or read from it."""
        return float(self.document["disk_bytes_per_second"]["value"])

    def pinning_rate(self) -> float:
        """Bytes of pinned host memory that are taken in a second."""
        return float(self.document["pinned_bytes_per_second"]["value"])

    def efficiency(self, resource: str) -> float:
        """Share of the peak rate of ``linear``, ``link`` or ``memory``."""
        return float(self.document["efficiency"][resource]["value"])


def _of_card(rows: list[dict[str, Any]], capability: tuple[int, int]) -> dict[str, Any]:
    """The first row whose capability the card has; rows begin with the newest."""
    return next(row for row in rows if capability >= tuple(row["least_capability"]))


@cache
def calibration() -> Calibration:
    """The shipped constants."""
    content = PATH.read_bytes()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Calibration(yaml.load(content, Loader=loader), hashlib.sha256(content).hexdigest())

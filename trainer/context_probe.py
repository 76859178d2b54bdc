"""What one training process takes of a card outside torch's allocator, and what CUDA shows of the card.

    python -m trainer.context_probe

It is a process of its own, because a context grows with every library that is loaded and never shrinks. It runs what
a training step runs (products, attention forward and backward), and prints one JSON object: ``visible_bytes``, and
``context_bytes``, which is null where the driver does not tell what this process holds.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from trainer.measure import driver_reader


def probe() -> dict[str, Any]:
    """Load what a step loads, and look."""
    device = torch.device("cuda", 0)
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    query = torch.randn(1, 2, 256, 64, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(64, 64, device=device, dtype=dtype)
    torch.nn.functional.scaled_dot_product_attention(query, query, query @ weight, is_causal=True).sum().backward()
    torch.cuda.synchronize(device)
    read = driver_reader(device)
    held = read() if read is not None else None
    context = None if held is None else held - torch.cuda.memory_reserved(device)
    return {"visible_bytes": torch.cuda.get_device_properties(device).total_memory, "context_bytes": context}


if __name__ == "__main__":
    print(json.dumps(probe()))

"""For reports/optimizations.md: a real model with its key and value heads pooled, and what training mends of that."""

from __future__ import annotations

import json

from reports.quality.pooled import KV_HEADS, RECORD
from reports.render.records import DEMO


def section() -> str:
    """Held-out loss before and after, beside the model as it is."""
    if not RECORD.exists():
        return ""
    made, whole = (json.loads(place.read_text(encoding="utf-8")) for place in (RECORD, DEMO))
    losses = [found["evaluation"][when]["loss"] for found in (whole, made) for when in ("before", "after")]
    alike = whole["evaluation"]["before"]["tokens"] == made["evaluation"]["before"]["tokens"]
    told = (
        f"SmolLM2-135M-Instruct has 3 heads for keys and values. With {KV_HEADS}, the mean of these, its held-out loss "
        f"goes from {losses[0]:.3f} to {losses[2]:.3f}; {len(made['losses'])} steps of training bring that to "
        f"{losses[3]:.3f}, and the model as it is from {losses[0]:.3f} to {losses[1]:.3f} (`python -m "
        "reports.quality.pooled` and `make demo`, on the CPU with the same settings"
        + (" and held-out tokens" if alike else ", of which held-out files are others")
        + "; records [`pooled-heads.json`](quality/pooled-heads.json), [`demo-cpu.json`](validation/demo-cpu.json)). "
        "So much training does not bring back what was lost; how much would was not measured."
    )
    return f"## Heads pooled\n\n{told}"

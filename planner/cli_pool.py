"""`plan pool-heads`: a model with fewer heads for keys and values, made from one with more."""

from __future__ import annotations

from pathlib import Path

import click

from planner.errors import PlanError


@click.command("pool-heads", short_help="Make a model with fewer heads for keys and values.")
@click.argument("model")
@click.option("--kv-heads", type=int, required=True, metavar="N", help="So many heads for keys and values.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="A new folder for it.")
def pool_heads(model: str, kv_heads: int, out: Path) -> int:
    """Write another model to FOLDER: MODEL with its key and value heads pooled into N, each the mean of several.

    MODEL is a folder or a hub id. With fewer heads there is less to keep of keys and values, in training and in
    generation. The model is worse at first: train it again, and compare the held-out loss that is printed before and
    after with that of MODEL. It needs the train extra, and host memory for the largest of the model's files.

    \b
    plan pool-heads models/phi-2 --kv-heads 8 --out models/phi-2-8
    plan --gpu rtx3090 --model models/phi-2-8 --data code --execute
    """
    try:
        from trainer.pooling import pool_heads as pool
    except ImportError as error:
        nearest = "pip install 'tierplan[train]' brings it."
        raise PlanError("plan pool-heads", f"pooling needs the train extra ({error}).", nearest) from error
    click.echo(f"Written: {pool(model, kv_heads, out.expanduser())}")
    return 0

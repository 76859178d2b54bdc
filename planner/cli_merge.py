"""`plan merge`: the adapter of a finished run, merged into the weights it was trained beside."""

from __future__ import annotations

from pathlib import Path

import click

from planner.errors import PlanError


@click.command(short_help="Merge the adapter of a run into its model.")
@click.argument("run", type=click.Path(path_type=Path))
def merge(run: Path) -> int:
    """Write RUN/merged: the model with the run's adapter merged into its weights, in 16 bits.

    RUN is the folder of a run (train.out). Transformers loads what is written like any model, without PEFT. The model
    is loaded as the run's plan says, so it takes the planned card. `--set train.merge=true` does the same at the end of
    a run, and plans for it. It needs the train extra.

    \b
    plan merge runs/phi-2-18432
    """
    try:
        from trainer.merging import merge_run
    except ImportError as error:
        nearest = "pip install 'tierplan[train]' brings it."
        raise PlanError("plan merge", f"merging needs the train extra ({error}).", nearest) from error
    click.echo(f"Written: {merge_run(run.expanduser())}")
    return 0

"""`purekv families`: which models are supported, and how each of them is tested."""

import json

import typer

from purekv.cli import options
from purekv.cli.errors import explains_errors


@explains_errors
def families(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """List the model families: what they take, where it was tested, what does not work."""
    import transformers

    from purekv.families.table import rows

    found = rows()
    if as_json:
        typer.echo(json.dumps({"transformers": transformers.__version__, "families": found}))
        return
    for row in found:
        absent = "" if row["present"] else f" (absent from transformers {transformers.__version__})"
        typer.echo(f"{row['family']}{absent}")
        for name in ("model_types", "checkpoints", "modalities", "attention"):
            if row[name]:
                typer.echo(f"  {name.replace('_', ' ')}: {', '.join(row[name])}")
        typer.echo(f"  sparse prefill: {'yes' if row['spatiotemporal'] else 'no'}")
        typer.echo(f"  tested on: {'; '.join(row['tested_on'])}")
        if row["limits"]:
            typer.echo(f"  limits: {row['limits']}")

"""`purekv`: the verbs, and what a mistyped one prints."""

import sys

import typer

from purekv.cli import (
    batch,
    bench,
    calibrate,
    data,
    evaluate,
    families,
    inspect,
    reference,
    run,
    serve,
)  # fmt: skip
from purekv.cli.arguments import ManyValues

app = typer.Typer(
    name="purekv",
    help="Vision-language models on long videos with a fraction of the KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run", cls=ManyValues)(run.run)
app.command("eval")(evaluate.evaluate)
app.command("batch")(batch.batch)
app.command("bench")(bench.bench)
app.command("calibrate")(calibrate.calibrate)
app.command("inspect", cls=ManyValues)(inspect.inspect)
app.command("families")(families.families)
app.command("serve", context_settings=serve.PASSED_ON)(serve.serve)
app.add_typer(reference.app, name="reference")
app.add_typer(data.app, name="data")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 2 for bad input, 130 for Ctrl-C, or a
    verb's own."""
    try:
        code = app(arguments, standalone_mode=False)
    except typer.Abort:
        code = 130
    except Exception as error:
        # Usage errors; Typer brings its own copy of Click, so they have no common class to import.
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()} (see purekv --help)", file=sys.stderr)
        code = 2
    sys.exit(code or 0)

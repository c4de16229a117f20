"""The calibquant command."""

from __future__ import annotations

import sys

import typer

from calibquant.cli import console
from calibquant.cli.demo import demo
from calibquant.cli.evaluate import evaluate
from calibquant.cli.inspect import inspect
from calibquant.cli.quantize import quantize
from calibquant.errors import CalibQuantError

app = typer.Typer(
    help="Quantize trained vision CNNs to low bits: accurate, really small, explained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, quantize, evaluate, inspect):
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 1 with a one-line error.

    With --debug among the arguments an error also shows its stack trace.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        return app([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="calibquant") or 0
    except CalibQuantError as error:
        message = str(error)
    except typer.TyperException as error:
        message = f"{error.format_message().rstrip('.')}; see calibquant --help"
    except (KeyboardInterrupt, typer.Abort):
        message = "interrupted; nothing was left behind"
    except Exception as error:
        message = (
            f"internal error ({type(error).__name__}: {' '.join(str(error).split())[:200]}); run again with --debug"
        )
    if debug:
        console.err.print_exception()
    console.err.print(f"error: {message}", style="red", markup=False)
    return 1

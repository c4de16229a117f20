"""The calibquant command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from calibquant.cli import console
from calibquant.cli.analyze import analyze
from calibquant.cli.bench import bench
from calibquant.cli.compare import compare
from calibquant.cli.demo import demo
from calibquant.cli.evaluate import evaluate
from calibquant.cli.export import export
from calibquant.cli.finetune import finetune
from calibquant.cli.inspect import inspect
from calibquant.cli.judge import judge
from calibquant.cli.output import prepare_streams
from calibquant.cli.quantize import quantize
from calibquant.cli.recipes import recipes
from calibquant.cli.select import select
from calibquant.cli.signals import heard
from calibquant.cli.study import study
from calibquant.cli.train import train
from calibquant.cli.waiting import wait_briefly
from calibquant.errors import CalibQuantError, OutOfMemoryError, RecipeError, RunFolderError, lacks_memory

IN_PARALLEL = ("train", "quantize", "finetune", "evaluate")  # commands that share their work among processes
INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    help="Quantize trained vision CNNs to low bits: accurate, really small, explained.",
    epilog="With --debug an error also shows its stack trace.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    demo,
    train,
    select,
    judge,
    quantize,
    finetune,
    evaluate,
    inspect,
    analyze,
    compare,
    study,
    export,
    bench,
    recipes,
):
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or with a one-line error 1, or 128 + n after signal n.

    With --debug among the arguments an error also shows its stack trace.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    wait_briefly()
    prepare_streams()
    console.stdout.failure = None
    with heard() as told:
        try:
            rest = [a for a in arguments if a != "--debug"] or ["--help"]
            with _processes(rest[0]):
                code = app(rest, standalone_mode=False, prog_name="calibquant") or 0
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if console.stdout.failure is not None:
                problem = f"cannot be written ({console.stdout.failure.strerror})"
                mend = "free space there, or send it elsewhere; the command's files are complete"
                raise RunFolderError("standard output", problem, mend)
            return code
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in arguments:
                console.err.print_exception()
            console.err.print(f"error: {_line(error)}", style="red", markup=False)
            return told.code


@contextmanager
def _processes(command: str) -> Iterator[None]:
    """Under torchrun the processes work together, and the first one speaks."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    from calibquant import parallel

    if command not in IN_PARALLEL:
        raise RecipeError(f"calibquant {command}", "is no work for several processes", "start it without torchrun")
    with parallel.together():
        console.out.quiet = parallel.rank() > 0
        yield


def _line(error: BaseException) -> str:
    """What a user is told of an error, in one line."""
    if isinstance(error, CalibQuantError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted; nothing was left behind"
    if isinstance(error, typer.TyperException):
        return f"{' '.join(error.format_message().split()).rstrip('.')}; see calibquant --help"
    if lack := lacks_memory(error):
        mend = "lower the batch sizes that the recipe sets, or the size of its images"
        return str(OutOfMemoryError("memory", f"there is less than this needs ({lack})", mend))
    if isinstance(error, UnicodeEncodeError):
        problem = f"the system's encoding, {error.encoding}, lacks '{error.object[error.start : error.end]}'"
        return str(RunFolderError("file name", problem, "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"))
    return f"internal error ({type(error).__name__}: {' '.join(str(error).split())[:200]}); run again with --debug"

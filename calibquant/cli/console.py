"""What every command shares: the console, live progress, tables, JSON, and one-line errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from calibquant.cli.output import Output

stdout = Output("stdout")
# Piped output is for files and pagers: wide enough that tables keep their lines whole.
out = Console(file=stdout, highlight=False, soft_wrap=True, width=None if stdout.isatty() else 140)  # type: ignore[arg-type]
err = Console(file=Output("stderr"), highlight=False, soft_wrap=True)  # type: ignore[arg-type]


class ConsoleReporter:
    """Draws numbered steps and a live progress bar with the time left."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._bar: TaskID | None = None

    def step(self, number: int, total: int, title: str) -> None:
        """A step begins."""
        self._clear()
        self._console.print(f"[bold]\\[{number}/{total}][/bold] {title}")

    def progress(self, done: int, total: int, where: str = "") -> None:
        """Work done within the step, and where it stands in words."""
        if self._bar is None:
            self._bar = self._progress.add_task("", total=total)
        self._progress.update(self._bar, completed=done, total=total, description=f"      {where}")

    def note(self, text: str) -> None:
        """A fact worth showing."""
        self._console.print(f"      {text}", style="dim")

    def _clear(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None


@contextmanager
def reporting(quiet: bool) -> Iterator[ConsoleReporter | None]:
    """A reporter for the length of a command; None with --json."""
    if quiet or out.quiet:
        yield None
        return
    words = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn(compact=True), words)
    with Progress(*columns, console=out, transient=True) as progress:
        yield ConsoleReporter(progress, out)


def words(text: str) -> list[str]:
    """The parts of a list with commas, e.g. w4a4, w2a2."""
    return [word.strip() for word in text.split(",") if word.strip()]


def print_json(value: Any) -> None:
    """A value as JSON on standard output, for machines."""
    if out.quiet:
        return
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1)  # spelled otherwise, values would change
    stdout.write(text + "\n")
    stdout.flush()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; the first column to the left, all others to the right."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # names from files may look like markup
    out.print(table)


def percent(fraction: float | None) -> str:
    """0.9173 -> 91.73; a dash when unknown."""
    return "–" if fraction is None else f"{100 * fraction:.2f}"


def kilobytes(count: int) -> str:
    """Bytes in kB (1,000) or MB (1,000,000) with three digits."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def interval(bounds: Sequence[float] | None) -> str:
    """(0.9, 0.95) -> 90.0–95.0; a dash when unknown."""
    return "–" if bounds is None else f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}"

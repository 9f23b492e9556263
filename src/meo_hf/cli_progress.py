"""The terminal: what a command prints, and how far its long work is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from meo_hf.conversion.progress import Progress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show stages and bytes on the terminal's error stream; nothing where it is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from meo_hf.conversion.progress import Progress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        current: list[Any] = []

        def stage(name: str, total: int) -> None:
            for task in current:
                bar.remove_task(task)
            current[:] = [bar.add_task(name, total=total)]

        def advance(count: int) -> None:
            bar.advance(current[0], count)

        yield Progress(stage, advance)

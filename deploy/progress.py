"""A dataset job's progress for a person (a bar with rate and time left) or for a log (a plain line every few seconds)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deploy.batch import JobProgress

PLAIN_INTERVAL_S = 5.0


@contextmanager
def job_progress(console: Console) -> Iterator[Callable[[JobProgress], None]]:
    """A callback that shows a job's progress on ``console``."""
    if console.is_terminal:
        with _bar(console) as show:
            yield show
    else:
        yield _PlainLines(console)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[JobProgress], None]]:
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("images", total=None, rate="")

        def show(progress: JobProgress) -> None:
            rate = bar.tasks[task].finished_speed or bar.tasks[task].speed
            failed = f", {progress.failed} failed" if progress.failed else ""
            bar.update(
                task,
                total=progress.total,
                completed=progress.resumed + progress.done,
                rate=f"{rate:.1f}/s{failed}" if rate else "",
            )

        yield show


class _PlainLines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = self._last = time.monotonic()

    def __call__(self, progress: JobProgress) -> None:
        now = time.monotonic()
        completed = progress.resumed + progress.done
        if 0 < completed < progress.total and now - self._last < PLAIN_INTERVAL_S:
            return
        self._last = now
        rate = progress.done / (now - self._started) if progress.done else 0.0
        left = f", {(progress.total - completed) / rate:.0f} s left" if rate and completed < progress.total else ""
        self._console.print(
            f"{completed}/{progress.total} images, {progress.failed} failed, {rate:.1f}/s{left}", highlight=False
        )

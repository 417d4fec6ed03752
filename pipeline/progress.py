"""How far the work is, on stderr: bars on a terminal, a line now and then elsewhere. Both are a `ports.Progress` and a context manager."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0
ENOUGH_TO_ESTIMATE_S = 3.0


class Display(Protocol):
    """A `ports.Progress` that is shown between `__enter__` and `__exit__`. May be called from any thread."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...
    def __enter__(self) -> Display: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def display() -> Display:
    """Bars where stderr is a terminal that can move its cursor, else lines."""
    return Bars() if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") else Lines()


class _Stage:
    """One stage from its first call on. It begins anew when its count goes back: the next system, say."""

    def __init__(self, now: float, done: int) -> None:
        self.begun, self.first, self.done = now, done, done
        self.shown = now
        self.note = ""

    def left(self, now: float, done: int, total: int) -> float | None:
        """Seconds to go at the speed so far; None while that says nothing."""
        spent, gained = now - self.begun, done - self.first
        return spent * (total - done) / gained if gained > 0 and done < total and spent > ENOUGH_TO_ESTIMATE_S else None

    def words(self, now: float, done: int, total: int, note: str) -> str:
        """The note, with the time left where it does not say it itself."""
        left = None if " left" in note else self.left(now, done, total)
        return ", ".join(part for part in (note, f"{duration(left)} left" if left is not None else "") if part)


class Lines:
    """A line when a stage begins and ends, and at most one in ten seconds between."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._stages: dict[str, _Stage] = {}
        self._lock = threading.RLock()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        with self._lock:
            now = self._clock()
            known = self._stages.get(stage)
            ends = 0 < total <= done
            if known is None or done < known.done:
                known = self._stages[stage] = _Stage(now, done)
            elif not (ends and known.done < done) and now - known.shown < SECONDS_BETWEEN_LINES:
                known.done = done
                return
            known.done, known.shown = done, now
            words = f"{note + ', ' if note else ''}done in {duration(now - known.begun)}" if ends else known.words(now, done, total, note)
            self._write(" ".join(part for part in (f"{spoken(stage)}:", f"{done:,}/{total:,}" if total else "", words or "…") if part))

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more: no reason to stop the work
            print(line, file=self._stream or sys.stderr, flush=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        return


class Bars:
    """A bar for each stage, with its note. A stage of unknown length is there only while it is the latest."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(min_width=10, no_wrap=True)),
            BarColumn(bar_width=20 if console.width >= 90 else 8),
            TextColumn("{task.fields[count]}", markup=False, justify="right", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            TextColumn("{task.fields[words]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            refresh_per_second=5,
            expand=True,
        )
        self._tasks: dict[str, tuple[TaskID, _Stage]] = {}
        self._endless: str | None = None
        self._lock = threading.RLock()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        with self._lock:
            now = time.monotonic()
            if self._endless not in (None, stage):
                self._hide_endless()
            if stage not in self._tasks:
                task = self._progress.add_task(spoken(stage), total=total or None, count="", words="")
                self._tasks[stage] = task, _Stage(now, done)
            task, known = self._tasks[stage]
            if done < known.done:
                self._progress.reset(task, total=total or None)
                self._tasks[stage] = task, _Stage(now, done)
                known = self._tasks[stage][1]
            known.done = done
            known.note = note or ("" if total and done == 0 else known.note)
            count, words = f"{done:,}/{total:,}" if total else "", known.words(now, done, total, known.note)
            self._progress.update(task, completed=done, total=total or None, count=count, words=words)
            self._endless = stage if not total else None

    def _hide_endless(self) -> None:
        task, _ = self._tasks.pop(str(self._endless))
        self._progress.remove_task(task)
        self._endless = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            if self._endless is not None:
                self._hide_endless()
        self._progress.stop()


def spoken(stage: str) -> str:
    return stage.replace("_", " ")


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 5 s`, `2 h 4 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

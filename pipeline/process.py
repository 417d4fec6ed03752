"""What the command sets up around its work and takes down after it: signals, logs and warnings on stderr, a stdout for results alone."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from pipeline.errors import INTERRUPTED, TERMINATED, DatasetTooSmallWarning, PipelineError

OUR_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)  # by the number of -v
THEIR_LEVELS = (logging.CRITICAL, logging.WARNING, logging.INFO)
PACKAGE = Path(__file__).parent
# Read by the libraries when they are imported. Bars and notices of theirs would tear ours; none of them may report home.
QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "RAGAS_DO_NOT_TRACK": "true",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C for what cleans up on the way out."""


class Interrupted(PipelineError):
    """The user, or the system, wants it to end. What is written so far is whole."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        terminated = isinstance(cause, Terminated)
        kept = "what was finished is kept; the same command goes on from there"
        super().__init__("terminated" if terminated else "interrupted", hint=kept)
        self.exit_code = TERMINATED if terminated else INTERRUPTED


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt and Terminated, once; the next one of either ends the process at once.

    A signal that the parent had ignored (nohup, a background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end_at_once(number: int, frame: FrameType | None) -> None:
        os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)

    def stop(number: int, frame: FrameType | None) -> None:
        for ours in before:
            signal.signal(ours, end_at_once)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before: dict[int, Any] = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def results_alone_on_stdout() -> Iterator[None]:
    """Sends to stderr whatever libraries print meanwhile, from Python or from C."""
    saved = None
    with contextlib.suppress(OSError, ValueError):  # a closed stream, or none with a descriptor
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).fflush(None)  # what C has printed but not written yet
            os.dup2(saved, 1)
            os.close(saved)


class _OnStderr(logging.Handler):
    """Lines as `warning: …` on what sys.stderr is at the moment, so that they don't tear a progress bar."""

    def __init__(self, verbose: int) -> None:
        super().__init__()
        self.verbose = verbose
        self.ours, self.theirs = OUR_LEVELS[verbose], THEIR_LEVELS[verbose]

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= (self.ours if record.name.partition(".")[0] == "pipeline" else self.theirs)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # nobody reads stderr any more
            try:
                sys.stderr.write(self.format(record) + "\n")
            except (TypeError, ValueError):
                self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        where = f"{record.name}: " if self.verbose else ""
        text = f"{record.levelname.lower()}: {where}{printable(record.getMessage())}"
        return f"{text}\n{logging.Formatter().formatException(record.exc_info)}" if record.exc_info and self.verbose else text


@contextlib.contextmanager
def logs_on_stderr(verbose: int) -> Iterator[None]:
    """Our warnings, from -v on more; of other packages what is fatal, from -v on their warnings."""
    verbose = min(verbose, 2)
    handler = _OnStderr(verbose)
    root, ours = logging.getLogger(), logging.getLogger("pipeline")
    levels = root.level, ours.level
    new = {name: value for name, value in QUIET_LIBRARIES.items() if name not in os.environ}
    root.addHandler(handler)
    root.setLevel(handler.theirs)
    ours.setLevel(handler.ours)
    os.environ.update(new)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DatasetTooSmallWarning)
            warnings.showwarning = _log_warning
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        for name in new:
            os.environ.pop(name, None)


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Warnings from other packages are for their users, us: they show with -v."""
    ours = issubclass(category, DatasetTooSmallWarning) or Path(filename).is_relative_to(PACKAGE)
    logging.getLogger("pipeline" if ours else "warnings").warning("%s", message)


def open_streams() -> None:
    """Gives a process that was started without stdout or stderr a place to write to, and lets no odd character stop a message."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  open for as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write_out(text: str) -> None:
    """Writes to stdout and flushes. A reader that has gone away (`| head`) is no error: the work is done."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end


def write_error(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")


def printable(text: str) -> str:
    """The text with control characters spelt out: what comes from a file must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)

"""The run folder: atomic writes, a manifest a stage written last, resume. Every write to disk goes through here."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError, OutputError
from pipeline.records import to_plain


def digest_file(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes.

    Raises:
        ArtifactError: missing or unreadable.
    """
    try:
        with path.open("rb") as handle:
            return "sha256:" + hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"{path}: can't be read: {error.strerror}", hint="restore the file, or run the stage that makes it again"
        ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and vanishes when it does not.

    Raises:
        OutputError: the folder can't be written, or the disk is full.
    """
    temporary = None
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            os.close(handle)
            temporary = Path(name)
        with explained(path):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with line feeds, atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Writes dataclasses, mappings and sequences as indented JSON, atomically."""
    write_text(path, json.dumps(to_plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """
    Raises:
        ArtifactError: missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file", hint="run the stage that makes it: `pipeline run`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged: {error}", hint="delete it and run again") from error


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the errors of a full disk or a folder that can't be written into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path.parent}: the disk is full", hint="free some space, or name another folder with output_dir") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, *_NO_PATH):
            raise OutputError(
                f"{path}: can't be written: {error.strerror}", hint="check the folder's owner and rights, or name another one"
            ) from error
        raise


_NO_PATH = (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def require_new(folder: Path) -> None:
    """
    Raises:
        OutputError: it is there already, and not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: is there already", hint="name a new folder")


class RunFolder:
    """Where a run leaves its files. A stage is done when its manifest holds the key asked for and its files are whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def _manifest_path(self, stage: str) -> Path:
        return self.path / ".stages" / f"{stage}.json"

    def manifest(self, stage: str) -> Mapping[str, Any] | None:
        """What was recorded when the stage was last finished; None when it never was or the record is damaged."""
        try:
            manifest = read_json(self._manifest_path(stage))
        except ArtifactError:
            return None
        return manifest if _is_manifest(manifest) else None

    def damaged(self, stage: str) -> str | None:
        """What is wrong with the stage's record, or None."""
        path = self._manifest_path(stage)
        return f"{path}: damaged; delete it and run again" if path.exists() and self.manifest(stage) is None else None

    def why_not_done(self, stage: str, key: str) -> str | None:
        """Why the stage must run, or None. Files are compared by size and time; by digest when the time differs."""
        manifest = self.manifest(stage)
        if manifest is None:
            return "never finished here"
        if manifest["key"] != key:
            return "its inputs changed"
        return next(iter(self.changed(stage)), None)

    def changed(self, stage: str, *, full: bool = False) -> Iterator[str]:
        """What is wrong with the files that the stage left. `full` compares every file by its digest."""
        for name, entry in ((self.manifest(stage) or {}).get("files") or {}).items():
            path = self.path / name
            if not path.is_file():
                yield f"{name} is missing"
                continue
            status = path.stat()
            untouched = not full and status.st_mtime_ns == entry["mtime_ns"]
            if status.st_size != entry["size"] or not (untouched or digest_file(path) == entry["digest"]):
                yield f"{name} was changed"

    def finish(self, stage: str, key: str, files: list[str], facts: Mapping[str, Any] | None = None) -> None:
        """Records the stage as done. Call it last."""
        entries = {}
        for name in files:
            path = self.path / name
            status = path.stat()
            entries[name] = {"digest": digest_file(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        write_json(self._manifest_path(stage), {"key": key, "files": entries, "facts": dict(facts or {})})


def _is_manifest(found: Any) -> bool:
    """Whether it has the shape that `RunFolder.finish` writes."""
    if not isinstance(found, dict) or not isinstance(found.get("facts"), dict) or not isinstance(found.get("files"), dict):
        return False
    entries = found["files"].values()
    return "key" in found and all(isinstance(entry, dict) and {"digest", "size", "mtime_ns"} <= entry.keys() for entry in entries)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

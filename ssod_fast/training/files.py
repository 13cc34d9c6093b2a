"""Files that are either whole or absent, whenever the process dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: Path, keep_previous: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder and renames it to `path` at the end of the block.

    Args:
        path: final name.
        keep_previous: leave what stood there under `<stem>.previous<suffix>`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some libraries write files that only their owner may read
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())  # a rename may reach the disk before the data does
        if keep_previous and path.exists():
            _second_name(path, previous(path))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The bits that new files of this process do not get; reading them without setting them is not possible."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _second_name(path: Path, other: Path) -> None:
    """Makes `other` a second name of the file, so that `path` exists at every moment."""
    temporary = other.with_name(f".{other.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a killed process, it may be a name of a file that must not be written
    if other.exists() and other.samefile(path):
        return  # killed between the two renames; renaming one name of a file to another would do nothing and leave both
    try:
        os.link(path, temporary)
    except OSError:  # no hard links on this file system
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def previous(path: Path) -> Path:
    """Where :func:`atomic` leaves the file that it replaces."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def require_writable(folder: Path) -> None:
    """Creates a folder and proves that a file can be written there.

    Raises:
        PermissionError: it cannot; the message names the folder and the cause, and asks for another --out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(b"\0" * 4096)
            handle.flush()
    except OSError as error:
        raise PermissionError(f"cannot write to the folder {folder}: {error.strerror or error}; choose another with --out") from error

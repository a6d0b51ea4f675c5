"""Small things about files that many share."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def file_lock(target: Path) -> Iterator[None]:
    """Let one process at a time make `target`; others wait, then find it made. A killed process frees the lock."""
    if sys.platform == "win32":  # has no flock; two processes would then both do the work
        yield
        return
    import fcntl

    lock = target.parent / ".cache" / f"{target.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def check_file_path(flag: str, path: str) -> None:
    """ValueError if a flag that names a file to be written or read names a folder, or one below a file."""
    if path and Path(path).is_dir():
        raise ValueError(f"--{flag} {path} is a folder: name a file")
    check_parents(flag, path)


def check_folder_path(flag: str, path: str) -> None:
    """ValueError if a flag that names a folder names a file, or a folder below a file."""
    if path and Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"--{flag} {path} is a file: name a folder")
    check_parents(flag, path)


def check_parents(flag: str, path: str) -> None:
    for parent in Path(path).parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"--{flag} {path} cannot be: {parent} is a file")

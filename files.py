"""Two small things about files that readers, the downloader and the makers of local data share."""

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
def alone(target: Path) -> Iterator[None]:
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

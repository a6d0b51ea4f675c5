"""Files over HTTP: from the first server that has them, resumed after a cut, checked, and in place only when whole."""

import errno
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.files import file_lock, sha256_of

BLOCK = 1 << 18


class Entry(NamedTuple):
    """One file of a collection."""

    size: int  # bytes; 0: not known before a server says it
    sha256: str  # ""  not known: then the size alone is checked
    file: str
    urls: tuple[str, ...]  # the authors' server first, then mirrors
    owner: str  # whose file it is: "D4RL"


class DownloadError(OSError):
    """No server gave the file. The message names each and its reason, and says what to do by hand."""


class _Retry(Exception):
    """A cut, a stall or a server's bad moment: worth another try."""


class _GiveUp(Exception):
    """This server will not give the file, however often it is asked."""


def fetch(
    name: str,
    entry: Entry,
    dataset_dir: str | Path,
    *,
    attempts: int = 5,
    timeout: float = 10.0,
    backoff: Callable[[int], float] = lambda failures: min(2.0**failures, 30.0),
) -> Path:
    """Bring the file of `entry` into `dataset_dir` unless it is there; returns its path. name: what people call it.

    attempts: consecutive failures without a new byte after which a server is given up; timeout: seconds without a byte
    after which a connection counts as cut; backoff: failures so far -> seconds to wait. A server that cannot be
    reached, or says that it has no such file, is given up at once. What has arrived stays in `<file>.part` for the next
    time.
    Raises DownloadError, and OSError if the disk is too small.
    """
    target = Path(dataset_dir) / entry.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(target):
        if not target.exists():
            _download(name, entry, target, attempts, timeout, backoff)
    return target


def _download(
    name: str, entry: Entry, target: Path, attempts: int, timeout: float, backoff: Callable[[int], float]
) -> None:
    from tqdm import tqdm

    part = target.with_name(target.name + ".part")
    _check_space(target, entry.size - _size(part))
    reasons = []
    with tqdm(total=entry.size or None, initial=_size(part), unit="B", unit_scale=True, desc=name, disable=None) as bar:
        for url in entry.urls:
            try:
                _fetch_whole(url, entry, part, bar, attempts, timeout, backoff)
            except _GiveUp as reason:
                reasons.append(f"  {url}: {reason}")
                continue
            part.replace(target)
            return
    size = f" ({entry.size / 1e6:.1f} MB)" if entry.size else ""
    raise DownloadError(
        "\n".join(
            [f"{name} could not be downloaded:"]
            + reasons
            + [
                f"By hand: fetch one of these addresses{size} on any machine and save it as",
                f"  {target}",
                "or point --dataset_dir at a folder that has it. The same command tries again, from where it stopped.",
            ]
        )
    )


def _fetch_whole(url, entry: Entry, part: Path, bar, attempts: int, timeout: float, backoff) -> None:
    """Ask `url` until `part` is the whole, checked file; _GiveUp with the reason otherwise."""
    inherited, most, failures, size = _size(part) > 0, _size(part), 0, entry.size
    while True:
        try:
            if not size or _size(part) < size:
                size = _fetch(url, entry, part, bar, timeout)
        except _Retry as reason:
            # a server that starts from zero every time and is cut at the same place makes no progress
            most, failures = (_size(part), 1) if _size(part) > most else (most, failures + 1)
            if failures >= attempts:
                raise _GiveUp(f"{reason}; gave up after {attempts} attempts") from reason
            time.sleep(backoff(failures))
            continue
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _disk_full(part, size - _size(part)) from error
            raise
        found = sha256_of(part)
        if found == (entry.sha256 or found):
            return
        part.unlink()
        if not inherited:
            raise _GiveUp(
                f"sent another file: its SHA-256 is {found}, {entry.owner}'s is {entry.sha256}; it was removed"
            )
        inherited, most = False, 0  # the half that an earlier process left was bad: once more from the start


def _fetch(url: str, entry: Entry, part: Path, bar, timeout: float) -> int:
    """One connection: append to `part` what comes, until it is whole. Returns how long that is."""
    have = _size(part)
    with _connect(url, part, have, timeout) as answer:
        if answer.status == 200:  # from the start, whatever was asked
            have = 0
        length = answer.headers["Content-Length"]
        size = entry.size or (int(length) + have if length else 0)
        if not size:
            raise _GiveUp("does not say how long the file is, so a cut one could not be told from a whole one")
        if length and int(length) + have != size:
            raise _GiveUp(f"offers {int(length) + have} bytes where {entry.owner}'s file has {size}")
        bar.total, bar.n = size, have
        with open(part, "ab" if have else "wb") as f:
            for block in _blocks(answer, timeout):
                have += len(block)
                if have > size:
                    raise _GiveUp(f"sends more than the {size} bytes of {entry.owner}'s file")
                f.write(block)
                bar.update(len(block))
    if have < size:
        raise _Retry(f"cut at {have} of {size} bytes")
    return size


def _connect(url: str, part: Path, have: int, timeout: float):
    """The server's answer, or which kind of no it was."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # it does not have our range: begin again
            part.unlink()
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _Retry(f"HTTP {error.code} {error.reason}") from error
        raise _GiveUp(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _GiveUp(f"cannot be reached ({error.reason})") from error
    except TimeoutError as error:
        raise _Retry(f"no answer within {timeout:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"cut before it answered ({error!r})") from error


def _blocks(answer, timeout: float) -> Iterator[bytes]:
    """The body as it comes. What goes wrong here is the network's doing, not the disk's."""
    try:
        while block := answer.read1(BLOCK):
            yield block
    except TimeoutError as error:
        raise _Retry(f"fell silent for {timeout:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"cut ({error!r})") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(target: Path, needed: int) -> None:
    if shutil.disk_usage(target.parent).free < needed:
        raise _disk_full(target, needed)


def _disk_full(path: Path, needed: int) -> OSError:
    free = shutil.disk_usage(path.parent).free
    return OSError(
        errno.ENOSPC,
        f"{path.parent} is on a full disk: {needed} more bytes are needed, {free} are free. "
        "Make room, or choose another place with --dataset_dir; what has arrived is kept",
    )

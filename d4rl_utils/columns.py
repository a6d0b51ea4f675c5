"""Are recorded columns what can be trained on? The same checks for every file, whichever program wrote it."""

import logging
from pathlib import Path

import numpy as np

from d4rl_utils.names import DIMS

log = logging.getLogger(__name__)

LAYOUT = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1, "next_observations": 2}
OPTIONAL = ("timeouts", "next_observations")
ANT_WITH_CONTACTS = (111, 8)
LARGEST_VALUE = 1e12  # squares and sums of what is larger leave float32
LARGEST_RATIO = 2000  # of a column's size to the file's: deflate makes at most 1032 bytes of one


class Unusable(ValueError):
    """A file that is whole, and cannot be trained on."""


def check_claimed(place: str | Path, claimed: int, size: int) -> None:
    """Before memory is taken for it: can a file of `size` bytes hold `claimed` bytes of numbers?"""
    if claimed > LARGEST_RATIO * size:
        raise Unusable(
            f"{place} says that it holds {claimed / 1e9:,.0f} GB and is {size:,} bytes long, which no "
            "compression does. Remove it and get it again."
        )


def check_contacts(place: str | Path, contacts: str, drop: bool) -> None:
    """contacts: what `sound_columns` says of ant's contact forces; unless they are to be dropped, Unusable."""
    if contacts and not drop:
        raise Unusable(
            f"{place} {contacts} The environment here has no contact forces, so an agent that sees them could not "
            "be evaluated: train without them (--ant_contacts drop), or record the data with Ant-v4."
        )
    if contacts:
        log.warning("%s %s They are left out (--ant_contacts drop).", place, contacts)


def sound_columns(place: str | Path, found: dict) -> tuple[dict[str, np.ndarray], list[str], str]:
    """The layout's arrays, float32 and bool, of one length, finite; which had another shape; and, in words, where there
    are contact forces.

    found: column -> array, or h5py.Dataset. place: what to call the data in an error (Unusable).
    """
    columns, notes = {}, []
    rows = found["observations"].shape[:1]
    for key, ndim in LAYOUT.items():
        data = found.get(key)
        if data is None:
            continue
        if data.dtype.kind not in "fiub":
            raise Unusable(f"{place}: '{key}' holds {data.dtype}, not numbers.")
        shape = data.shape
        if (len(shape), ndim) == (2, 1) and shape[1] == 1:  # as in some of D4RL's first files
            shape = shape[:1]
        elif (len(shape), key) == (1, "actions"):
            shape = (*shape, 1)
        if len(shape) != ndim or shape[:1] != rows:
            raise Unusable(
                f"{place}: '{key}' has shape {data.shape}; expected {ndim} dimension(s) and {rows[0] if rows else 0} "
                "rows, as many as 'observations'. The columns are of different recordings, or it is another layout."
            )
        if not data.size:
            raise Unusable(f"{place}: '{key}' has shape {data.shape}: there is no transition in the file.")
        if shape != data.shape:
            notes.append(f"'{key}' has shape {data.shape} and is read as {shape}.")
        columns[key] = _finite(place, key, data[:].reshape(shape))
    if "next_observations" in columns and columns["next_observations"].shape != columns["observations"].shape:
        raise Unusable(
            f"{place}: 'next_observations' has shape {columns['next_observations'].shape}, "
            f"'observations' {columns['observations'].shape}; they must be the same."
        )
    contacts = ""
    if (columns["observations"].shape[1], columns["actions"].shape[1]) == ANT_WITH_CONTACTS:
        keep = DIMS["ant"][0]
        for key in [k for k in ("observations", "next_observations") if k in columns]:
            used = columns[key][:, keep:].any(1)
            if used.any():
                contacts = f"has 111 state dims as D4RL's ant, but the last 84 are not all zero ('{key}', first in row "
                contacts += f"{used.argmax()}, in {used.sum():,} of {len(used):,})."
            columns[key] = columns[key][:, :keep].copy()
    return columns, notes, contacts


def _finite(place: str | Path, key: str, values: np.ndarray) -> np.ndarray:
    """Flags as bool, everything else as float32 and finite."""
    flag = key in ("terminals", "timeouts")
    if flag:
        good = (values == 0) | (values == 1)
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes infinite, and is refused below
            values = values.astype(np.float32, copy=False)
        good = np.isfinite(values)
    if not good.all():
        rows = np.flatnonzero(~good.reshape(len(values), -1).all(1))
        what = "a value that is neither 0 nor 1" if flag else "NaN or infinity"
        raise Unusable(
            f"{place}: '{key}' holds {what}, first in row {rows[0]}, in {len(rows)} of {len(values)} rows. "
            "Leave these episodes out of the file, or record them again."
        )
    if not flag and max(values.max(), -values.min()) > LARGEST_VALUE:
        raise Unusable(
            f"{place}: '{key}' reaches from {values.min():.3g} to {values.max():.3g}, and nothing can be learned from "
            f"numbers beyond {LARGEST_VALUE:g}. Are they in another unit, or were never written? Scale them, or leave "
            "these episodes out."
        )
    return values.astype(bool) if flag else values

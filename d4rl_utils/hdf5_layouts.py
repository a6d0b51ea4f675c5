"""Where in an HDF5 file the columns of D4RL's layout are, of three layouts:

- D4RL's: one data set a column (`reader`);
- d3rlpy 1's (MDPDataset.dump): the same, with `episode_terminals` at the end of every episode for `timeouts`;
- d3rlpy 2's (ReplayBuffer.dump): four data sets an episode, `observations_0`, `actions_0`, `rewards_0` and
  `terminated_0`, which says whether the task ended the episode, or it was cut.
"""

from pathlib import Path

import numpy as np

from d4rl_utils.columns import LAYOUT, OPTIONAL, Unusable, check_claimed

EPISODE = ("observations", "actions", "rewards", "terminated")


def found_columns(path: Path, file) -> dict:
    """The columns of D4RL's layout (`columns.LAYOUT`) that an open h5py.File has: h5py.Datasets, or arrays joined here.

    Raises Unusable where one is missing, lies in another file, or is said to be larger than the file can be, and what
    h5py raises for a damaged file.
    """
    import h5py

    if "num_episodes" in file and "columns" in file:
        return _episodes_joined(path, file)
    for key in (*LAYOUT, "episode_terminals"):
        _check_place(path, file, key)
    found = {key: file[key] for key in LAYOUT if isinstance(file.get(key), h5py.Dataset)}
    if "timeouts" not in found and isinstance(file.get("episode_terminals"), h5py.Dataset):  # d3rlpy 1: every end
        found["timeouts"] = file["episode_terminals"]
    missing = [key for key in LAYOUT if key not in OPTIONAL and key not in found]
    if missing:
        raise Unusable(
            f"{path} has no dataset {' or '.join(repr(k) for k in missing)}; it holds {', '.join(file) or 'nothing'}. "
            "D4RL's layout is observations, actions, rewards, terminals [, timeouts, next_observations]."
        )
    check_claimed(path, sum(data.size * data.dtype.itemsize for data in found.values()), path.stat().st_size)
    return found


def _episodes_joined(path: Path, file) -> dict[str, np.ndarray]:
    """The episodes of d3rlpy's second layout behind each other."""
    count = int(file["num_episodes"][()])
    if count < 1:
        raise Unusable(f"{path}: 'num_episodes' is {count}: there is no transition in the file.")
    names, claimed = [], 0
    for i in range(count):  # may be said to be any number: nothing is built for it before the columns are found
        names.append([f"{column}_{i}" for column in EPISODE])
        for name in names[-1]:
            _check_place(path, file, name)
            if name not in file:
                several = " (but several in a tuple: only one vector is learned from)" if f"{name}_0" in file else ""
                raise Unusable(f"{path} is d3rlpy's, is to hold {count} episodes and has no '{name}'{several}.")
            claimed += file[name].size * file[name].dtype.itemsize
    check_claimed(path, claimed, path.stat().st_size)
    columns = {column: [file[episode[i]][()] for episode in names] for i, column in enumerate(EPISODE)}
    for column, parts in columns.items():
        kinds = sorted({part.shape[column != "terminated" :] for part in parts}, key=len)
        if len(kinds) > 1:
            raise Unusable(f"{path}: '{column}' has shapes {kinds} in its episodes; they must be the same.")
    for i, steps in enumerate(zip(*([len(part) for part in columns[column]] for column in EPISODE[:3]))):
        if len(set(steps)) > 1 or not steps[0]:
            raise Unusable(f"{path}: {', '.join(EPISODE[:3])} of episode {i} have {steps} rows; the same, above 0.")
    joined = {column: np.concatenate(columns[column]) for column in EPISODE[:3]}
    if joined["rewards"].ndim == 2 and joined["rewards"].shape[1] == 1:
        joined["rewards"] = joined["rewards"][:, 0]  # as d3rlpy always has them: nothing to remark
    last = np.cumsum([len(part) for part in columns["rewards"]]) - 1
    flags = np.array(columns["terminated"]).reshape(count)
    joined["terminals"], joined["timeouts"] = np.zeros((2, last[-1] + 1), flags.dtype)
    joined["terminals"][last], joined["timeouts"][last] = flags, 1
    return joined


def _check_place(path: Path, file, key: str) -> None:
    """A column lies in this very file: what lies elsewhere has no SHA-256 here, and can change or be missing."""
    import h5py

    where = file.get(key, getlink=True)
    other = where.filename if isinstance(where, h5py.ExternalLink) else None
    if other is None and isinstance(data := file.get(key), h5py.Dataset):
        if data.file.filename != file.filename:  # by a link on the way
            other = data.file.filename
        elif data.is_virtual or data.external:
            other = "others, as a virtual data set" if data.is_virtual else data.external[0][0]
    if other is not None:
        raise Unusable(
            f"{path}: '{key}' does not lie in this file but in {other}. Write all columns into one file "
            "(h5py: target[key] = source[key][:])."
        )

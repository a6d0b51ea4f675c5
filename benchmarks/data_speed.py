"""Windows per second of the sampler beside a DataLoader over a per-item Dataset; seconds to open a file, cold and
cached.

    python benchmarks/data_speed.py [--file FILE.hdf5]

Without a file, hopper's local random set is made first (1M transitions).
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from harness import median_seconds, write
from torch.utils.data import DataLoader, Dataset

import d4rl_utils
from common.windows import WindowSampler, window


class PerItem(Dataset):
    """The usual way: one window at a time, in Python."""

    def __init__(self, transitions, k: int):
        self.t, self.k = transitions, k

    def __len__(self) -> int:
        return len(self.t.rewards)

    def __getitem__(self, i: int) -> tuple:
        rows = window(torch.tensor([i]), torch.tensor([int(self.t.episode_start[i])]), self.k)[0].numpy()
        states = torch.from_numpy(self.t.states[rows])
        next_state = torch.from_numpy(self.t.next_states[i : i + 1].copy())
        action = torch.from_numpy(self.t.actions[i].copy())
        reward, not_done = torch.tensor(self.t.rewards[i]), torch.tensor(1.0 - self.t.terminals[i])
        return states, action, reward, torch.cat([states[1:], next_state]), not_done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="an HDF5 file in D4RL's layout")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--context_length", type=int, default=5)
    args = parser.parse_args()
    b, k = args.batch_size, args.context_length

    with tempfile.TemporaryDirectory() as folder:
        if args.file:
            path = Path(shutil.copy(args.file, folder))
        else:
            d4rl_utils.open_dataset("hopper", "random", "local", folder)
            path = next(Path(folder).glob("*.hdf5"))
            shutil.rmtree(Path(folder) / ".cache", ignore_errors=True)
        opening = {}
        for how in ("cold", "cached"):
            start = time.perf_counter()
            data = d4rl_utils.read_hdf5(path)
            sampler = WindowSampler(data.transitions, k, "cpu", 0)
            opening[f"{how}_s"] = round(time.perf_counter() - start, 3)

        ours = b / median_seconds(lambda: sampler.sample(b), 20, 300)
        peers = {}
        for workers in (0, 2):
            loader = DataLoader(PerItem(data.transitions, k), b, shuffle=True, num_workers=workers)
            batches = iter(loader)
            peers[f"DataLoader, {workers} workers"] = b / median_seconds(lambda: next(batches), 5, 60)  # noqa: B023

    ratio = ours / max(peers.values())
    result = {
        "transitions": data.identity.transitions,
        "batch_size": b,
        "context_length": k,
        "open": opening,
        "windows_per_s": {"sampler": round(ours), **{name: round(v) for name, v in peers.items()}},
        "ratio_to_the_faster_peer": round(ratio, 1),
    }
    for name, value in result["windows_per_s"].items():
        print(f"{name:24} {value:>12,} windows/s")
    print(f"ratio to the faster peer {ratio:>12.0f}")
    print(f"open {data.identity.transitions:,} transitions: cold {opening['cold_s']} s, cached {opening['cached_s']} s")
    print(write("data_speed", result))


if __name__ == "__main__":
    main()

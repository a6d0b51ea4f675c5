"""Can Bamba's encoder take a difference? Velocities from windows of positions, by regression.

    python benchmarks/velocity.py --file datasets/hopper-medium-reroll.hdf5

Windows of K positions of hopper, normalised -> the velocities of the last state. The encoder is Bamba's, with and
without attention pooling and RoPE; beside it an LSTM in its place, and MLPs on the whole window and on the last
position. Prints the share of variance explained on held-out windows, and writes it into docs/results.md.
"""

import argparse

import numpy as np
import torch
from harness import ROOT, SMALL_SIZES, write
from torch import Tensor, nn

from common.logger import put_into_page
from config import parse
from d4rl_utils import read_hdf5
from d4rl_utils.observe import POSITIONS
from model import Encoder, mlp

K, WIDTH, ROWS = 5, 64, 200_000
AT = (500, 1000, 3000)  # updates
KINDS = {
    "Mamba-2, attention pooling, RoPE (Bamba's)": {},
    "Mamba-2, the last place": {"pool": False},
    "Mamba-2, attention pooling, no RoPE": {"rope": False},
    "Mamba-2, the last place, no RoPE": {"pool": False, "rope": False},
    "LSTM, attention pooling, RoPE": {"encoder": "lstm"},
    "MLP on the window": {"encoder": "window"},
    "MLP on the last position": {"encoder": "present"},
}


class Summary(nn.Module):
    """Windows (B, K, S) -> (B, WIDTH)"""

    def __init__(self, states: int, encoder: str = "mamba2", pool: bool = True, rope: bool = True):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        if encoder in ("window", "present"):
            self.net = mlp(states * (K if encoder == "window" else 1), 256, WIDTH)
            return
        flags = ["--preset", "upstream", *SMALL_SIZES, "--drop_p", "0", "--encoder", encoder]
        self.net = Encoder(parse(flags), states, K)
        if not rope:
            self.net.rope = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.encoder in ("window", "present"):
            return self.net((x if self.encoder == "window" else x[:, -1:]).flatten(1))
        return self.net(x) if self.pool else self.net.out(self.net.norm(self.net.mix(x, None)))[:, -1]


def explained(windows: Tensor, velocity: Tensor, kind: dict, seed: int) -> list[float]:
    """Of a tenth that is held out, after each of AT updates. windows (N, K, S), velocity (N, V)"""
    torch.manual_seed(seed)
    net, head = Summary(windows.shape[-1], **kind), mlp(WIDTH, 256, velocity.shape[1])
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=1e-3, weight_decay=0)
    cut, found = len(windows) * 9 // 10, []
    order = torch.Generator().manual_seed(seed)
    for update in range(1, max(AT) + 1):
        rows = torch.randint(cut, (256,), generator=order)
        loss = (head(net(windows[rows])) - velocity[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update in AT:
            with torch.no_grad():
                error = head(net(windows[cut:][:5000])) - velocity[cut:][:5000]
            found.append(round(1 - (error.square().mean() / velocity[cut:][:5000].var()).item(), 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", required=True, help="hopper's data, an HDF5 file in D4RL's layout")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transitions, info = read_hdf5(args.file)
    states, last = np.array(transitions.states[:ROWS]), np.arange(K - 1, ROWS)
    last = last[transitions.episode_start[last] <= last - (K - 1)]  # windows within one episode
    x = torch.from_numpy((states - states.mean(0)) / states.std(0))
    windows = x[torch.from_numpy(last)[:, None] + torch.arange(1 - K, 1)][..., : POSITIONS["hopper"]]
    velocity = x[torch.from_numpy(last), POSITIONS["hopper"] :]
    rows = {}
    for name, kind in KINDS.items():
        rows[name] = explained(windows, velocity, kind, args.seed)
        print(name, rows[name], flush=True)
    table = [f"| | {' | '.join(f'{n:,} updates' for n in AT)} |", "|---|" + "---:|" * len(AT)]
    table += [f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} |" for name, row in rows.items()]
    put_into_page("python benchmarks/velocity.py", "\n".join(table), ROOT / "docs" / "results.md")
    print(write("velocity", {"data": {"name": info.name, "sha256": info.sha256}, "explained_after": AT, "rows": rows}))


if __name__ == "__main__":
    main()

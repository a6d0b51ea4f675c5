"""Trained transitions per second: OPSO's segments beside the published scheme, one trained place in a window.

    python benchmarks/opso_speed.py --threads 1

The peer is the published update on the same networks and losses' arithmetic: windows of 100 states, the next window and
the goal repeated 100 times, each encoded by the online and by the target encoder, D 128, two Mamba-2 layers, batches of
16 as its README has them; of each window only the last step trains. Ours: `--preset small`, and the default sizes (D
128, two layers), the least time of the repeats on this process's own clock.
"""

import argparse
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from harness import median_seconds, write
from torch import Tensor

from common.interface import EnvSpec
from common.optim import TargetNetwork, adamw, clip, set_lr, td_target
from config import PRESETS, OPSOConfig
from ogbench_utils.goal_dataset import Goals, OfflineGoalDataset
from ogbench_utils.reader import Episodes
from opso import Opso
from opso.losses import cosine_step, expectile

WINDOW, BANK = 100, 10_000


class Published:
    """Its update on one thread: three windows, six encodings, one place each."""

    def __init__(self, cfg: OPSOConfig, spec: EnvSpec):
        self.cfg, self.spec, self.agent = cfg, spec, Opso(replace(cfg, nce_bank=1), spec)
        a = self.agent
        self.nets = [a.encoder, a.q, a.v, a.predict, a.success]
        self.slow_predict = TargetNetwork(a.predict)
        self.bank = F.normalize(torch.randn(BANK, cfg.d_model), dim=-1)
        self.optimizer = adamw(self.nets, 0.0, a.device)

    def update(self, states: Tensor, after: Tensor, goals: Tensor, reward: Tensor) -> None:
        """Windows (B, 100, S) three times, rewards (B,)"""
        a, cfg = self.agent, self.cfg
        set_lr(self.optimizer, 3e-4, 0, 1)
        z, z1, g = (a.encoder(x)[:, -1] for x in (states, after, goals))
        with torch.no_grad():
            slow, slow1, slow_g = (a.target_encoder(x)[:, -1] for x in (states, after, goals))
            target = td_target(reward, 1 - reward, a.v(slow1, slow_g).squeeze(-1), cfg.gamma)
            slow_q = a.target_q(slow, slow1, slow_g).amin(0)
        q = a.q(z, z1, g)
        loss = 2 * F.huber_loss(q, target.expand_as(q)) + (a.predict(z) - slow1).square().mean()
        loss = loss + 0.1 * expectile(slow_q, a.v(z, g).squeeze(-1), cfg.expectile).mean()
        loss = loss + F.binary_cross_entropy_with_logits(a.success(z1, g).squeeze(-1), reward)
        loss = loss + 0.1 * cosine_step(z, z1, g)[0].mean()
        one, two, label = F.normalize(z, dim=-1), F.normalize(z1, dim=-1), torch.arange(len(z))
        for x, y in ((one, two), (two, one)):
            loss = loss + 0.05 * F.cross_entropy(torch.cat([x @ y.mT, x @ self.bank.mT], 1) / 0.1, label)
        self.optimizer.zero_grad()
        loss.backward()
        clip(self.nets, 5.0)
        self.optimizer.step()
        self.bank = torch.cat([self.bank[2 * len(z) :], one.detach(), two.detach()])
        for slow_net, net in ((a.target_encoder, a.encoder), (a.target_q, a.q), (self.slow_predict, a.predict)):
            slow_net.polyak_update(net, 0.01)


def walk(state: int, action: int, rows: int = 20_000, length: int = 1000) -> Episodes:
    """Noise in a maze's shapes: the time of an update does not depend on what is in it."""
    rng = torch.Generator().manual_seed(0)
    states, actions = torch.randn(rows, state, generator=rng), torch.rand(rows, action, generator=rng) * 2 - 1
    return Episodes(states.numpy(), actions.numpy(), torch.arange(length - 1, rows, length).numpy())


def ours(cfg: OPSOConfig, spec: EnvSpec, repeats: int) -> float:
    agent = Opso(cfg, spec)
    goals = Goals(cfg.goal_current, cfg.goal_trajectory, 1.0, cfg.policy_near, cfg.gamma, 0.5)
    data = OfflineGoalDataset(walk(spec.state, spec.action), cfg.context_length, cfg.proposal_steps, goals, "cpu", 0)
    agent.fit_normalizer(data)
    step = lambda: agent.update(data.sample(cfg.batch_size))  # noqa: E731
    return median_seconds(step, 5, repeats, middle=min, clock=time.process_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile ours too, as another row")
    parser.add_argument("--batch", type=int, default=16, help="windows in an update of the published scheme")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spec = EnvSpec(29, 8, (-1.0,) * 8, (1.0,) * 8)
    rows = {}

    upstream = OPSOConfig(**{**PRESETS["opso"]["upstream"], "pool": "last", "drop_p": 0.0})
    peer, b = Published(upstream, spec), args.batch
    windows = [torch.randn(b, WINDOW, spec.state) for _ in range(3)]
    reward = (torch.arange(b) % 10 == 0).float()
    seconds = median_seconds(
        lambda: peer.update(*windows, reward), 2, max(3, args.repeats // 3), middle=min, clock=time.process_time
    )
    rows["published scheme, D 128, 2 layers, windows of 100"] = (seconds, b)
    small = {k: v for k, v in PRESETS["opso"]["small"].items() if k in ("d_model", "n_layers")}
    for label, cfg in (
        ("ours, small: D 64, 1 layer", OPSOConfig(**small)),
        ("ours, default: D 128, 2 layers", OPSOConfig()),
    ):
        for compiled in (False, True) if args.compile else (False,):
            seconds = ours(replace(cfg, compile=compiled), spec, args.repeats)
            rows[label + ", compiled" * compiled] = (seconds, cfg.batch_size * cfg.context_length)
    slow = rows["published scheme, D 128, 2 layers, windows of 100"]
    table = {}
    for label, (seconds, trained) in rows.items():
        rate = trained / seconds
        table[label] = {"ms": round(seconds * 1e3, 1), "transitions": trained, "transitions_per_s": round(rate)}
        table[label]["times_published"] = round(rate / (slow[1] / slow[0]), 1)
        times = table[label]["times_published"]
        print(f"{label:52} {seconds * 1e3:8.1f} ms  {rate:9,.0f} transitions/s  {times:6.1f} times")
    print(write("opso_speed", {"threads": args.threads, "repeats": args.repeats, "rows": table}))


if __name__ == "__main__":
    main()

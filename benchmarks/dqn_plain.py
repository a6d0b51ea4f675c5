"""The peer of `dqn_speed.py`: DQN on windows as the published loop does it, written again in plain terms.

A transition keeps both of its windows whole; the sum tree is binary, in float32, and takes one Python loop a leaf; a
new transition asks all leaves for the greatest; acting runs one forward for the latent and one for the action; the
Mamba-1 mixer makes every token's output by a loop over tokens with all decays in memory.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.mamba import Mamba1


def plain_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """mamba-ssm's reference in other words: decays and writes (B, L, E, N) first, then the loop, then C."""
    decay, write = torch.exp(torch.einsum("ble,en->blen", dt, A)), torch.einsum("ble,bln->blen", dt * x, B)
    state, ys = torch.zeros_like(decay[:, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + write[:, t]
        ys.append(torch.einsum("ben,bn->be", state, C[:, t]))
    return torch.stack(ys, 1)


class PlainMamba(Mamba1):
    """(B, L, D) -> (B, D)"""

    def __init__(self, cfg):
        super().__init__(cfg.d_model, cfg.d_state, cfg.d_conv, cfg.expand)

    def forward(self, e: Tensor) -> Tensor:
        x, z = self.in_proj(e).chunk(2, -1)
        width = self.conv1d.kernel_size[0]
        x = F.silu(F.conv1d(F.pad(x.mT, (width - 1, 0)), self.conv1d.weight, self.conv1d.bias, groups=x.shape[-1]).mT)
        dt, B, C = self.x_proj(x).split(self.widths, -1)
        y = plain_scan(x, F.softplus(self.dt_proj(dt)), -self.A_log.exp(), B, C) + self.D * x
        return self.out_proj(y * F.silu(z))[:, -1]


class PlainTree:
    """A binary sum tree, one leaf at a time."""

    def __init__(self, capacity: int):
        self.capacity, self.tree = capacity, torch.zeros(2 * capacity - 1)

    def set(self, leaf: int, priority: float) -> None:
        node = leaf + self.capacity - 1
        change = priority - self.tree[node]
        self.tree[node] = priority
        while node:
            node = (node - 1) // 2
            self.tree[node] += change

    def find(self, mass: float) -> int:
        node = 0
        while 2 * node + 1 < len(self.tree):
            left = 2 * node + 1
            if mass <= self.tree[left]:
                node = left
            else:
                mass, node = mass - self.tree[left], left + 1
        return node - self.capacity + 1

    def max_priority(self) -> float:
        return float(self.tree[self.capacity - 1 :].max()) or 1.0


class PlainDQN:
    """net: windows (B, L, S) -> Q (B, A), latent (B, D)"""

    def __init__(self, net: nn.Module, target: nn.Module, cfg):
        self.net, self.target, self.cfg = net, target, cfg
        self.target.load_state_dict(net.state_dict())
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
        self.tree, self.rows, self.steps = PlainTree(cfg.buffer_size), [], 0

    def act(self, window: Tensor, actions: int, epsilon: float) -> tuple[int, Tensor]:
        """An action for the window (L, S), and its latent."""
        with torch.no_grad():
            latent = self.net(window[None])[1][0]
            if random.random() < epsilon:
                return random.randrange(actions), latent
            return int(self.net(window[None])[0].argmax()), latent

    def push(self, *row) -> None:
        """window, action, reward, next window, done, latent"""
        leaf = self.steps % self.cfg.buffer_size
        self.rows[leaf : leaf + 1] = [row]
        self.tree.set(leaf, self.tree.max_priority())
        self.steps += 1

    def update(self, beta: float) -> float:
        cfg, total = self.cfg, float(self.tree.tree[0])
        part = total / cfg.batch_size
        leaves = [self.tree.find(random.uniform(part * i, part * (i + 1))) for i in range(cfg.batch_size)]
        mass = torch.stack([self.tree.tree[leaf + self.tree.capacity - 1] for leaf in leaves])
        weight = (len(self.rows) * mass / total + 1e-9) ** -beta
        rows = [self.rows[leaf] for leaf in leaves]
        window, action, reward, after, done, _ = (torch.stack([torch.as_tensor(x) for x in c]) for c in zip(*rows))
        q = self.net(window)[0].gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            wanted = reward + cfg.gamma * (1 - done) * self.target(after)[0].amax(1)
        error = wanted - q
        loss = (weight / weight.max() * F.smooth_l1_loss(q, wanted, reduction="none")).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), cfg.grad_clip)
        self.optimizer.step()
        for leaf, e in zip(leaves, error.tolist()):
            self.tree.set(leaf, (min(abs(e), 1.0) + 1e-6) ** cfg.per_alpha)
        return loss.item()

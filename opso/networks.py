"""OPSO's networks: the encoder of histories, and the heads on its latents. B batch, L length, S state, D latent."""

import torch
from torch import Tensor, nn

from model import MIXERS, RoPE, Trunk, mlp


class StateEncoder(nn.Module):
    """Histories as latents. (B, L, S) -> (B, L, D); place j sees the first j + 1 states and no later one

    Linear → mixer blocks → LayerNorm → Linear. As published also RoPE on the features, and a mean of the places so
    far, weighted by softmax(MLP), in place of the last one; both off unless asked for.
    """

    def __init__(self, cfg, state_dim: int):
        super().__init__()
        self.embed = nn.Linear(state_dim, cfg.d_model)
        self.rope = RoPE(cfg.d_model, cfg.context_length + cfg.proposal_steps) if cfg.rope else None
        mixers = [MIXERS[cfg.mixer](cfg) for _ in range(cfg.n_layers)]
        self.trunk = Trunk(mixers, cfg.d_model, nn.LayerNorm, cfg.drop_p)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)
        self.score = mlp(cfg.d_model, cfg.d_model // 4, 1) if cfg.pool == "attention" else None

    def forward(self, states: Tensor) -> Tensor:
        x = self.embed(states)
        x = self.out(self.trunk(self.rope(x) if self.rope else x))
        if self.score is None:
            return x
        score = self.score(x)
        weight = (score - score.amax(1, keepdim=True)).clamp_min(-60).exp()
        return (weight * x).cumsum(1) / weight.cumsum(1)


class Head(nn.Module):
    """An MLP on several latents side by side. (..., widths) -> (..., out)

    norm: a LayerNorm behind every ReLU; OGBench's agents have one behind a GELU, which takes a tenth of an update more.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, out: int, norm: bool):
        super().__init__()
        widths = [inputs] + [hidden] * layers
        parts = []
        for i, o in zip(widths, widths[1:]):
            parts += [nn.Linear(i, o), *([nn.ReLU(), nn.LayerNorm(o)] if norm else [nn.ReLU()])]
        self.net = nn.Sequential(*parts, nn.Linear(widths[-1], out))

    def forward(self, *latents: Tensor) -> Tensor:
        return self.net(torch.cat(latents, -1))


class TwinValue(nn.Module):
    """Two critics of a move that do not share a weight: Q(z, z', z_g). (..., D) three times -> (2, ...)"""

    def __init__(self, dim: int, hidden: int, norm: bool):
        super().__init__()
        self.nets = nn.ModuleList(Head(3 * dim, hidden, 2, 1, norm) for _ in range(2))

    def forward(self, *latents: Tensor) -> Tensor:
        return torch.stack([net(*latents).squeeze(-1) for net in self.nets])

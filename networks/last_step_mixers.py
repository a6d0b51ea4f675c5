"""What makes one vector of a window of embeddings, read at the last position: (B, L, D) -> (B, D). Each takes a config.

  none          the newest embedding as it is
  lstm          one LSTM layer
  transformer   one post-norm encoder layer with learned positions (arXiv 1706.03762)
  mamba         one bare Mamba-1 layer (arXiv 2312.00752), parameters as in mamba.py

Nobody looks at the other positions' outputs, so the last two do not compute them. Letters: B batch, L context,
D = d_model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.mamba import Mamba1, causal_conv
from networks.selective_scan import selective_scan_last


class LastToken(nn.Module):
    """The last embedding as it is. (B, L, D) -> (B, D)"""

    def __init__(self, cfg):
        super().__init__()

    def forward(self, e: Tensor) -> Tensor:
        return e[:, -1]


class LSTM(nn.LSTM):
    """The last output of one layer. (B, L, D) -> (B, D)"""

    def __init__(self, cfg):
        super().__init__(cfg.d_model, cfg.d_model, batch_first=True)

    def forward(self, e: Tensor) -> Tensor:
        return super().forward(e)[0][:, -1]


class Transformer(nn.Module):
    """One post-norm encoder layer, read at the last position, so nothing else is computed. (B, L, D) -> (B, D)"""

    def __init__(self, cfg):
        super().__init__()
        if cfg.d_model % cfg.n_heads:
            raise ValueError(f"d_model = {cfg.d_model} must be a multiple of n_heads = {cfg.n_heads}")
        self.pos_embedding = nn.Parameter(torch.zeros(cfg.context_length, cfg.d_model))
        self.pos_embedding._no_weight_decay = True
        self.layer = nn.TransformerEncoderLayer(cfg.d_model, cfg.n_heads, cfg.ff_dim, dropout=0.0, batch_first=True)

    def forward(self, e: Tensor) -> Tensor:
        x, layer = e + self.pos_embedding, self.layer
        y = layer.norm1(x[:, -1:] + layer.self_attn(x[:, -1:], x, x, need_weights=False)[0])
        return layer.norm2(y + layer.linear2(F.relu(layer.linear1(y))))[:, 0]


class Mamba(Mamba1):
    """One bare Mamba-1 layer, no norm, no residual; only the last output is computed. (B, L, D) -> (B, D)"""

    def __init__(self, cfg):
        super().__init__(cfg.d_model, cfg.d_state, cfg.d_conv, cfg.expand)

    def forward(self, e: Tensor) -> Tensor:
        into, gate = self.in_proj.weight.chunk(2)  # all tokens go in, the last one alone is gated and names C
        writes, reads = self.x_proj.weight.split([sum(self.widths[:2]), self.widths[2]])
        x = F.silu(causal_conv(F.linear(e, into), self.conv1d.weight, self.conv1d.bias))
        dt, B = F.linear(x, writes).split(self.widths[:2], -1)
        C, z = F.linear(x[:, -1], reads), F.linear(e[:, -1], gate)
        y = selective_scan_last(x, F.softplus(self.dt_proj(dt)), -self.A_log.exp(), B, C) + self.D * x[:, -1]
        return self.out_proj(y * F.silu(z))


MIXERS = {
    "none": LastToken,
    "lstm": LSTM,
    "transformer": Transformer,
    "mamba": Mamba,
}

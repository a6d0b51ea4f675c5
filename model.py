"""Networks, from small to large: MLP, normaliser, RoPE, attention pooling, attention, the trunk of mixers, the encoder,
twin critics.

Letters: B batch, K (or L) context length, S state, A action, D = d_model. Mixers have letters of their own, in
mamba.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.train_step import Compilable
from networks.mamba import Mamba1, Mamba2
from networks.multi_grained import DualMamba, MultiGrained


def mlp(*widths: int, layer_norm: bool = False) -> nn.Sequential:
    """ReLU network with the given widths. (..., widths[0]) -> (..., widths[-1]). layer_norm: behind every ReLU"""
    layers = []
    for i, o in zip(widths, widths[1:-1]):
        layers += [nn.Linear(i, o), nn.ReLU(), *([nn.LayerNorm(o)] if layer_norm else [])]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


class Normalizer(nn.Module):
    """States in units of the dataset's spread; the statistics travel in the agent's checkpoint. (..., S) -> (..., S)"""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, rows: Tensor) -> None:
        """rows: (N, S), in raw units."""
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0) + 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class RoPE(nn.Module):
    """Turns features (2i, 2i+1) of position t by t·10000^(−2i/D) (arXiv 2104.09864). (B, L, D) -> (B, L, D)"""

    def __init__(self, dim: int, max_len: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"d_model = {dim} is odd, but RoPE turns pairs of features: take {dim - 1} or {dim + 1}")
        speed = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(torch.arange(max_len, dtype=torch.float64), speed)  # (L, D/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class AttentionPool(nn.Module):
    """A mean over time, weighted by softmax(MLP(e_t)). (B, L, D) -> (B, D)"""

    def __init__(self, dim: int):
        super().__init__()
        self.score = mlp(dim, max(dim // 4, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        return (score.softmax(1, dtype=torch.promote_types(score.dtype, torch.float32)) * x).sum(1)

    def prefixes(self, x: Tensor) -> Tensor:
        """The same of x[:, :1], x[:, :2], ..., at once; the last is `forward`'s. (B, L, D) -> (B, L, D)"""
        score = self.score(x).mT  # (B, 1, L)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        score = score.to(torch.promote_types(score.dtype, torch.float32)).masked_fill(future, -torch.inf)
        return score.softmax(-1) @ x.to(score.dtype)


class Attention(nn.Module):
    """Causal self-attention, weights N(0, 0.02²) as GPT-2's. (B, L, D) -> (B, L, D)"""

    def __init__(self, dim: int, n_heads: int, drop_p: float = 0.0):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"d_model = {dim} must be a multiple of n_heads = {n_heads}")
        self.n_heads, self.drop_p = n_heads, drop_p
        self.qkv, self.out = gpt2_linear(dim, 3 * dim), gpt2_linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H) each
        if self.training and self.drop_p:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
            weight = score.softmax(-1).to(v.dtype)
            y = dropout(weight, dropout_mask_bits(1, weight)[0], self.drop_p) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class LSTM(nn.Module):
    """One layer of torch's LSTM, as wide as its input. (B, L, D) -> (B, L, D)"""

    def __init__(self, dim: int):
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def gpt2_linear(inputs: int, outputs: int) -> nn.Linear:
    """GPT-2's start: weights N(0, 0.02²), no bias yet."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


MIXERS = {
    "attention": lambda cfg: Attention(cfg.d_model, cfg.n_heads, cfg.drop_p),
    "mamba1": lambda cfg: Mamba1(**mamba1_sizes(cfg)),
    "grained": lambda cfg: MultiGrained(**mamba1_sizes(cfg)),
    "dual": lambda cfg: DualMamba(**mamba1_sizes(cfg)),
    "mamba2": lambda cfg: Mamba2(
        cfg.d_model, cfg.d_state, cfg.d_conv, cfg.expand, cfg.headdim, backend=cfg.mamba_backend
    ),
    "lstm": lambda cfg: LSTM(cfg.d_model),
}


def mamba1_sizes(cfg) -> dict:
    return {
        "d_model": cfg.d_model,
        "d_state": cfg.d_state,
        "d_conv": cfg.d_conv,
        "expand": cfg.expand,
        "backend": cfg.mamba_backend,
    }


class Block(nn.Module):
    """x + dropout(mixer(norm(x))). (B, L, D) -> (B, L, D)

    mask_bits: one of `dropout_mask_bits`; None: no dropout.
    """

    def __init__(self, mixer: nn.Module, dim: int, drop_p: float, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm, self.mixer, self.drop_p = norm(dim, eps=1e-5), mixer, drop_p

    def forward(self, x: Tensor, mask_bits: Tensor | None = None) -> Tensor:
        y = self.mixer(self.norm(x))
        return x + (y if mask_bits is None else dropout(y, mask_bits, self.drop_p))


def dropout(y: Tensor, mask_bits: Tensor, p: float) -> Tensor:
    """y with each element 0 with probability p (to 1/65536), else divided by 1 − p.

    mask_bits: 16 random bits an element, as one int16.
    """
    return y * ((mask_bits >= round(p * 2**16) - 2**15) * (1 / (1 - p)))


def dropout_mask_bits(count: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """16 random bits for each element of `like`, `count` times. (B, L, D) -> (count, B, L, D) int16

    Drawn for all layers at once and outside the compiled blocks: on a CPU eight times faster than F.dropout's own
    generator, which takes longer than a block's arithmetic.
    """
    n = count * like.numel()
    mask_bits = torch.randint(-(2**63), 2**63 - 1, ((n + 3) // 4,), device=like.device, generator=generator)
    return mask_bits.view(torch.int16)[:n].view(count, *like.shape)


class Trunk(nn.Module):
    """Blocks one above the other, and a norm at the end. (B, L, D) -> (B, L, D)

    mixers: of the blocks, in order; those that can go on from a state (`init_state`, `step_tokens`) let the trunk do so
    too.
    """

    def __init__(self, mixers: list[nn.Module], dim: int, norm: type[nn.Module], drop_p: float):
        super().__init__()
        if not mixers:
            raise ValueError("n_layers = 0: a trunk needs at least 1")
        if not 0 <= drop_p < 1:
            raise ValueError(f"drop_p = {drop_p} is no dropout probability: take 0 or more and less than 1")
        self.blocks = nn.ModuleList(Block(mixer, dim, drop_p, norm) for mixer in mixers)
        self.norm, self.drop_p = norm(dim, eps=1e-5), drop_p

    def compile_blocks(self) -> None:
        """Blocks of one kind share their code: seconds to compile, however many there are."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        mask_bits = [None] * len(self.blocks)
        if self.training and self.drop_p:
            first, *mask_bits = dropout_mask_bits(len(self.blocks) + 1, x)
            x = dropout(x, first, self.drop_p)
        for block, its_bits in zip(self.blocks, mask_bits):
            x = block(x, its_bits)
        return self.norm(x)

    def init_state(self, n: int) -> tuple:
        """The state of every block before the first token, for n rows; empty for one that remembers nothing."""
        return tuple(b.mixer.init_state(n) if hasattr(b.mixer, "init_state") else () for b in self.blocks)

    def step_tokens(self, x: Tensor, states: tuple, real: Tensor) -> tuple[Tensor, tuple]:
        """A few more tokens (n, c, D); real (n, c): 0 for those that leave no trace. -> (n, c, D), the next states"""
        after = []
        for block, state in zip(self.blocks, states):
            y = block.norm(x)
            y, state = block.mixer.step_tokens(y, state, real) if state else (block.mixer(y), state)
            x = x + y
            after.append(state)
        return self.norm(x), tuple(after)


class Encoder(Compilable):
    """The last K states as one vector, (B, K, S) -> (B, D); or `sequence`, that of every prefix of them.

    Linear → RoPE → mixer blocks → LayerNorm → Linear → attention pooling; with `state_skip` the present state itself
    stands behind that, and D is wider by S. Mixers are those of `MIXERS`, all causal.
    mask_bits: what `draw_mask_bits` gave; None, without dropout, is how targets are computed and how
    the agent acts.
    """

    def __init__(self, cfg, state_dim: int, max_len: int):
        super().__init__()
        self.state_skip = cfg.state_skip
        self.dim = cfg.d_model + state_dim * cfg.state_skip
        self.embed = nn.Linear(state_dim, cfg.d_model)
        self.rope = RoPE(cfg.d_model, max_len)
        self.blocks = nn.ModuleList(
            Block(MIXERS[cfg.encoder](cfg), cfg.d_model, cfg.drop_p) for _ in range(cfg.n_layers)
        )
        self.drop_p = cfg.drop_p
        self.norm = nn.LayerNorm(cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)
        self.pool = AttentionPool(cfg.d_model)
        if cfg.compile:
            self.compile_blocks()

    def compile_blocks(self) -> None:
        """One block's code serves all of them: seconds to compile, whatever n_layers is."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self.compile_methods("tokens", "summary", "summaries")

    def tokens(self, states: Tensor) -> Tensor:
        """(B, K, S) -> (B, K, D), what enters the first block."""
        return self.rope(self.embed(states))

    def summary(self, x: Tensor) -> Tensor:
        """What leaves the last block, (B, K, D) -> (B, D)"""
        return self.pool(self.out(self.norm(x)))

    def summaries(self, x: Tensor) -> Tensor:
        """The same after every token, (B, L, D) -> (B, L, D)"""
        return self.pool.prefixes(self.out(self.norm(x)))

    def draw_mask_bits(self, states: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Random bits for one pass over states (B, K, S): (n_layers, B, K, D) int16; None where nothing
        is dropped."""
        if not (self.training and self.drop_p):
            return None
        return dropout_mask_bits(
            len(self.blocks), states.new_empty(()).expand(*states.shape[:2], self.norm.weight.numel()), generator
        )

    def forward(self, states: Tensor, mask_bits: Tensor | None = None) -> Tensor:
        z = self.summary(self.mix(states, mask_bits))
        return torch.cat([z.to(states.dtype), states[:, -1]], -1) if self.state_skip else z

    def sequence(self, states: Tensor, mask_bits: Tensor | None = None) -> Tensor:
        """(B, L, S) -> (B, L, D): at each place the vector of the states up to it"""
        z = self.summaries(self.mix(states, mask_bits))
        return torch.cat([z.to(states.dtype), states], -1) if self.state_skip else z

    def mix(self, states: Tensor, mask_bits: Tensor | None) -> Tensor:
        x = self.tokens(states)
        for block, its_bits in zip(self.blocks, [None] * len(self.blocks) if mask_bits is None else mask_bits):
            x = block(x, its_bits)
        return x


class Present(nn.Module):
    """No encoder: the present state itself, for agents that are an MLP on it. The faces are `Encoder`'s."""

    def __init__(self, state_dim: int):
        super().__init__()
        self.dim = state_dim

    def draw_mask_bits(self, states: Tensor, generator: torch.Generator | None = None) -> None:
        return None

    def forward(self, states: Tensor, mask_bits: None = None) -> Tensor:
        return states[:, -1]

    def sequence(self, states: Tensor, mask_bits: None = None) -> Tensor:
        return states

    def compile_blocks(self) -> None:
        """There is nothing to compile."""


class TwinQ(nn.Module):
    """Two critics that do not share a weight. (B, X), (B, A) -> (2, B)"""

    def __init__(self, input_dim: int, action_dim: int, hidden_dim: int, depth: int = 2, layer_norm: bool = False):
        super().__init__()
        widths = (input_dim + action_dim, *[hidden_dim] * depth, 1)
        self.nets = nn.ModuleList(mlp(*widths, layer_norm=layer_norm) for _ in range(2))

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        xa = torch.cat([x, action], -1)
        return torch.stack([net(xa).squeeze(-1) for net in self.nets])

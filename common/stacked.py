"""Many seeds in one process: the parameters of S agents stacked on a leading axis, and one update for all of them.

Each seed has its own initialisation, data order, dropout and noise, and learns what it would have learned alone. A
small network leaves most of a card idle (and much of a CPU's time goes into launching operations), so S of them side by
side take little longer than one. The loss of one agent is mapped over the seeds by `torch.func.vmap`.

The parameters of a net lie in two tensors (S, P), those that decay and those that do not; the net sees views of them.
So clipping, AdamW and Polyak averages take a few launches each, however many parameters and seeds there are.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from common.cuda_graph import CudaGraph
from common.optim import adamw
from common.train_step import reported
from networks.mamba import SelectiveSSM


class FlatStack(nn.Module):
    """S copies of a net as two tensors (S, P) and views (S, *shape) of them, by name.

    prefix: of its parameters' names. like: the net whose matrices say what decays; a target network has its order.
    """

    def __init__(self, copies: Sequence[nn.Module], prefix: str, like: nn.Module | None = None):
        super().__init__()
        self.names: list[list[tuple[str, torch.Size]]] = [[], []]  # of those that do not decay, and of those that do
        columns: list[list[Tensor]] = [[], []]
        for name, first in (like or copies[0]).named_parameters():
            decays = first.ndim >= 2 and not getattr(first, "_no_weight_decay", False)
            self.names[decays].append((f"{prefix}.{name}", first.shape))
            columns[decays].append(torch.stack([net.get_parameter(name).detach().flatten() for net in copies]))
        flats = [torch.cat(c, 1) if c else torch.zeros(len(copies), 0, device=first.device) for c in columns]
        self.plain, self.decaying = (nn.Parameter(flat) for flat in flats)
        self.decaying._no_weight_decay = False
        self.plain._no_weight_decay = True  # it has two axes for another reason than a matrix

    def flats(self) -> list[nn.Parameter]:
        return [self.plain, self.decaying]

    def views(self, of: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """(S, *shape) by name; `of`: two tensors (S, P) in place of the parameters, their optimizer's moments say."""
        found = {}
        for flat, names in zip(of or self.flats(), self.names):
            parts = flat.detach().split([shape.numel() for _, shape in names], 1)
            for part, (name, shape) in zip(parts, names):
                found[name] = part.unflatten(1, shape) if shape else part[:, 0]
        return found

    def flatten(self, grads: dict[str, Tensor]) -> None:
        """Gradients (S, *shape) by name become the two tensors' own."""
        for flat, names in zip(self.flats(), self.names):
            if names:
                flat.grad = torch.cat([grads[name].flatten(1) for name, _ in names], 1)


class Losses(nn.Module):
    """An agent's `losses` as what a module computes, so that it can be computed with other parameters."""

    def __init__(self, agent: nn.Module):
        super().__init__()
        self.agent = agent

    def forward(self, batch, variant, noise):
        return self.agent.losses(batch, variant, noise)


class NextBuffers(nn.Module):
    """An agent's `next_buffers` as what a module computes."""

    def __init__(self, agent: nn.Module):
        super().__init__()
        self.agent = agent

    def forward(self, batch, metrics):
        return self.agent.next_buffers(batch, metrics)


class StackedAgents:
    """S agents that learn in one update. agents: built from their own seeds, on one device; sampler: of their data.

    seeds: for each agent those of its data order and of its noise. The agents themselves stay as they are until
    `unstack` brings what was learned into them.
    """

    def __init__(self, agents: list[nn.Module], sampler, seeds: list[tuple[int, int]], graphs: bool, compiled: bool):
        self.agents, self.sampler, self.cfg, self.device = agents, sampler, agents[0].cfg, agents[0].device
        cfg = replace(self.cfg, compile=False, cuda_graphs=False)  # the update of all is compiled and captured
        self.template = type(agents[0])(cfg, agents[0].spec, self.device)
        self.template.load_state_dict(agents[0].state_dict())
        self.module = Losses(self.template)
        names = {id(m): name for name, m in self.template.named_modules()}

        def stack(net: nn.Module, like: nn.Module | None = None) -> FlatStack:
            path = names[id(net)]
            return FlatStack([agent.get_submodule(path) for agent in agents], f"agent.{path}", like)

        # a stack for each net, as targets follow single nets; what has no parameters has none
        learning = [net for nets in self.template.clip_groups((True, False)).values() for net in nets]
        self.online = {id(net): stack(net) for net in learning if any(True for _ in net.parameters())}
        pairs = [*self.template.targets_before((True, True)), *self.template.targets_after((True, True))]
        self.targets = {id(t): stack(t.net, net) for t, net, _ in pairs if t and id(net) in self.online}
        weight_decay = self.cfg.weight_decay
        self.template.optimizer = self.optimizer = adamw(self.online.values(), weight_decay, self.device)
        self.params = {k: v for s in self.online.values() for k, v in s.views().items()}
        self.fixed = {k: v for s in self.targets.values() for k, v in s.views().items()}
        # buffers that may differ between agents: those that updates write
        buffers = [dict(agent.named_buffers()) for agent in agents]
        self.buffers = {f"agent.{k}": torch.stack([b[k] for b in buffers]) for k in type(agents[0]).learned_buffers}
        self.next_buffers = NextBuffers(self.template)
        self.template.updates = agents[0].updates
        self.stack_moments()
        self.data_rng, self.noise_rng = (
            [torch.Generator(self.device).manual_seed(pair[i]) for pair in seeds] for i in (0, 1)
        )
        # the compiler cannot take a selective scan's gradient under vmap
        compiled = compiled and not any(isinstance(m, SelectiveSSM) for m in self.template.modules())
        self.gradients = torch.compile(self.map_losses, dynamic=False) if compiled else self.map_losses
        self.run_step = self.step
        if graphs and self.device.type == "cuda":
            self.run_step = CudaGraph(self.step, (*self.data_rng, *self.noise_rng))

    @property
    def updates(self) -> int:
        return self.template.updates

    def train(self) -> None:
        self.template.train()

    def update(self) -> dict[str, Tensor]:
        """Sample and make one update of all seeds; metrics (S,)."""
        metrics = self.run_step((), self.template.begin_update())
        self.template.updates += 1
        return metrics

    def map_losses(self, batch, variant, noise) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients (S, *shape) by name, metrics (S,). batch, noise: (S, ...)"""

        def loss(params, fixed, buffers, batch, noise):
            return torch.func.functional_call(self.module, (params, fixed, buffers), (batch, variant, noise))

        gradient = torch.func.grad_and_value(loss, has_aux=True)
        dims = (0, 0, 0, seed_axes(batch), seed_axes(noise))
        grads, (_, metrics) = torch.func.vmap(gradient, dims, randomness="different")(
            self.params, self.fixed, self.buffers, batch, noise
        )
        return grads, metrics

    @torch.no_grad()
    def write_buffers(self, batch, metrics: dict[str, Tensor]) -> None:
        """What the update leaves in each agent's own buffers."""

        def after(buffers, batch, metrics):
            return torch.func.functional_call(self.next_buffers, buffers, (batch, metrics))

        found = torch.func.vmap(after, (0, seed_axes(batch), 0))(self.buffers, batch, metrics)
        for name, value in found.items():
            self.buffers[f"agent.{name}"].copy_(value)

    def step(self, _, variant) -> dict[str, Tensor]:
        template, seeds = self.template, len(self.agents)
        draws = [self.sampler.draw(self.cfg.batch_size, rng) for rng in self.data_rng]
        rows = self.sampler.at(pytree.tree_map(lambda *x: torch.cat(x), *draws))
        batch = pytree.tree_map(lambda x: x.unflatten(0, (seeds, -1)) if torch.is_tensor(x) else x, rows)
        one = pytree.tree_map(lambda x: x[0] if torch.is_tensor(x) else x, batch)  # for shapes
        noise = [template.draw_noise(one, rng) for rng in self.noise_rng]
        noise = pytree.tree_map(lambda *x: torch.stack(x) if torch.is_tensor(x[0]) else x[0], *noise)
        self.follow(template.targets_before(variant))
        grads, metrics = self.gradients(batch, variant, noise)
        if self.buffers:
            self.write_buffers(batch, metrics)
        metrics = reported(metrics)
        self.optimizer.zero_grad()
        for name, nets in template.clip_groups(variant).items():
            stacks = [self.online[id(net)] for net in nets if id(net) in self.online]
            for stack in stacks:
                stack.flatten(grads)
            if stacks:
                metrics[f"gradient/{name}"] = clip_each(stacks, self.cfg.grad_clip)
            else:  # nothing has a gradient in this variant
                metrics[f"gradient/{name}"] = torch.zeros(seeds, device=self.device)
        self.optimizer.step()
        self.follow(template.targets_after(variant))
        return metrics

    @torch.no_grad()
    def follow(self, pairs) -> None:
        """Polyak averages, of (target network, net, tau)."""
        for target, net, tau in pairs:
            if id(target) not in self.targets:  # of a net without parameters, or that does not learn
                continue
            mine, theirs = self.targets[id(target)].flats(), self.online[id(net)].flats()
            torch._foreach_lerp_([x.detach() for x in mine], [x.detach() for x in theirs], tau)

    def stack_moments(self) -> None:
        """Take over what the agents' optimizers have gathered, if they have learned before."""
        for stack in self.online.values():
            for flat, names in zip(stack.flats(), stack.names):
                own = [[agent.get_parameter(n.removeprefix("agent.")) for n, _ in names] for agent in self.agents]
                states = [[agent.optimizer.state.get(p, {}) for p in ps] for agent, ps in zip(self.agents, own)]
                if not names or not all("exp_avg" in state for row in states for state in row):
                    continue
                found = self.optimizer.state[flat]
                found["step"] = states[0][0]["step"].clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    found[key] = torch.stack([torch.cat([state[key].flatten() for state in row]) for row in states])

    @torch.no_grad()
    def unstack(self) -> None:
        """Bring what was learned into the agents, with their optimizers: each is then as if it had learned alone."""
        values = self.params | self.fixed
        for name, value in self.buffers.items():
            for agent, own in zip(self.agents, value):
                agent.get_buffer(name.removeprefix("agent.")).copy_(own)
        moments = {}
        for stack in self.online.values():
            state = [self.optimizer.state[flat] for flat in stack.flats()]
            if not all("exp_avg" in s for s in state):
                continue
            for key in ("exp_avg", "exp_avg_sq"):
                for name, value in stack.views([s[key] for s in state]).items():
                    moments.setdefault(name, {})[key] = value
            for names, s in zip(stack.names, state):
                for name, _ in names:
                    moments[name]["step"] = s["step"]
        lr = self.optimizer.param_groups[0]["lr"]
        for i, agent in enumerate(self.agents):
            agent.updates = self.updates
            for name, parameter in agent.named_parameters(prefix="agent"):
                if name in values:
                    parameter.copy_(values[name][i])
                if name in moments:
                    found = moments[name]
                    agent.optimizer.state[parameter] = {
                        "step": found["step"].clone(),
                        "exp_avg": found["exp_avg"][i].clone(),
                        "exp_avg_sq": found["exp_avg_sq"][i].clone(),
                    }
            for group in agent.optimizer.param_groups:
                group["lr"].copy_(lr)


def seed_axes(tree):
    """Along which axis vmap maps each leaf: seeds come first, what is no tensor is the same for all."""
    return pytree.tree_map(lambda x: 0 if torch.is_tensor(x) else None, tree)


def clip_each(stacks: list[FlatStack], norm: float) -> Tensor:
    """Scale every seed's gradients, of these nets together, to at most `norm`; the norms they had (S,)."""
    grads = [flat.grad for stack in stacks for flat in stack.flats() if flat.grad is not None]
    total = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in grads]).norm(dim=0)
    scale = (norm / (total + 1e-6)).clamp_max(1.0)
    torch._foreach_mul_(grads, [scale[:, None].expand_as(g) for g in grads])
    return total

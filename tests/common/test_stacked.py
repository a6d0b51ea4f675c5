"""Seeds that are stacked learn what each would have learned alone."""

import pytest
import torch
from conftest import TINY

from common.checkpoint import agent_of
from common.device import spawn_seeds
from common.interface import EnvSpec
from common.stacked import FlatStack, StackedAgents
from config import CONFIGS

SPEC = EnvSpec(11, 3, (-1.0,) * 3, (1.0,) * 3)
KINDS = {
    "bamba": dict(agent="bamba", drop_p=0.3),
    "ema, embedding": dict(agent="bamba", drop_p=0.3, target_encoder="ema", critic_input="embedding", eval_ema=0.9),
    "segments, rebrac": dict(agent="bamba", train_on="segments", objective="rebrac", critic_layernorm=True),
    "iql": dict(agent="bamba", objective="iql", critic_pretrain=3),
    "td3bc": dict(agent="bamba", encoder="none"),
    "bc": dict(agent="bamba", objective="bc", lr_schedule="cosine"),
    "dt": dict(agent="dt", drop_p=0.0),
    "dmamba": dict(agent="dmamba", drop_p=0.0),
    "dm": dict(agent="dm", drop_p=0.0, refresh_every=8),
    "dm, running mean": dict(agent="dm", drop_p=0.0, refresh_every=8, self_evolution="ema"),
}


def alone(kind: str, file, seed: int):
    """An agent, its sampler and the seeds of both, as `trainer.py --seed` begins."""
    changes = dict(KINDS[kind])
    config = CONFIGS[changes.pop("agent")]
    names = set(config.__dataclass_fields__)
    sizes = {k: v for k, v in (TINY | {"context_length": 4, "n_heads": 2}).items() if k in names}
    cfg = config(**{**sizes, "dataset": str(file), "device": "cpu", "seed": seed, **changes})
    kind = agent_of(cfg.agent)
    seeds = spawn_seeds(seed, "init", "data", "noise", "env")
    torch.manual_seed(seeds["init"])
    agent = kind(cfg, SPEC)
    sampler, _ = kind.open_data(cfg, "cpu", seeds["data"])
    agent.fit_normalizer(sampler)
    return agent.train(), sampler, seeds


def stacked(kind: str, file, count: int = 3, compiled: bool = False) -> StackedAgents:
    agents, samplers, seeds = zip(*(alone(kind, file, seed) for seed in range(count)))
    both = StackedAgents(list(agents), samplers[0], [(s["data"], s["noise"]) for s in seeds], False, compiled)
    both.train()
    return both


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_seeds_are_separate_runs(kind, hopper_file):
    updates = 100 if kind == "bamba" else 20
    together = stacked(kind, hopper_file)
    said = [{k: v.clone() for k, v in together.update().items()} for _ in range(updates)]
    together.unstack()
    for seed, learned in enumerate(together.agents):
        agent, sampler, seeds = alone(kind, hopper_file, seed)
        torch.manual_seed(seeds["noise"])
        for metrics in said:
            own = agent.update(sampler.sample(agent.cfg.batch_size))
            for k in metrics.keys() & own.keys():
                torch.testing.assert_close(
                    metrics[k][seed] if metrics[k].dim() else metrics[k], own[k], rtol=1e-5, atol=1e-5
                )
            assert {k for k in own if k != "policy/beta"} == metrics.keys() - {"policy/beta"}
        assert learned.updates == agent.updates
        # what a softmax does not feel has rounding for a gradient, which Adam blows up to whole steps
        for k, v in agent.state_dict().items():
            if not k.endswith("pool.score.2.bias"):
                torch.testing.assert_close(learned.state_dict()[k], v, rtol=1e-4, atol=1e-5, msg=k)


def test_what_is_unstacked_goes_on_alone(hopper_file):
    """One seed's agent, optimizer and all, makes the next update that the stack makes."""
    together = stacked("bamba", hopper_file)
    for _ in range(5):
        together.update()
    together.unstack()
    agent, sampler = together.agents[1], together.sampler
    sampler.generator.set_state(together.data_rng[1].get_state())
    torch.set_rng_state(together.noise_rng[1].get_state())
    after, own = together.update(), agent.update(sampler.sample(agent.cfg.batch_size))
    for k, v in own.items():
        torch.testing.assert_close(after[k][1], v, rtol=1e-6, atol=1e-6)


def test_seeds_differ(hopper_file):
    together = stacked("bamba", hopper_file)
    metrics = together.update()
    assert all(len(set(v.tolist())) == 3 for k, v in metrics.items() if k.startswith("loss/"))


def test_flat_views_are_the_parameters():
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)) for _ in range(4)]
    stack = FlatStack(nets, "a")
    views = stack.views()
    assert views.keys() == {"a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias"}
    for i, (linear, norm) in enumerate(nets):
        assert torch.equal(views["a.0.weight"][i], linear.weight) and torch.equal(views["a.1.bias"][i], norm.bias)
    with torch.no_grad():
        stack.decaying.add_(1.0)
    assert torch.equal(views["a.0.weight"][2], nets[2][0].weight + 1)  # the same memory
    assert torch.equal(views["a.0.bias"][2], nets[2][0].bias) and stack.decaying.shape == (4, 6)


def test_clipping_is_by_seed(hopper_file):
    together = stacked("bamba", hopper_file)
    norms = together.update()["gradient/critic"]
    grads = [flat.grad for flat in together.online[id(together.template.critic)].flats()]
    clipped = torch.cat(grads, 1).norm(dim=1)
    torch.testing.assert_close(clipped, norms.clamp_max(together.cfg.grad_clip), rtol=1e-4, atol=1e-6)

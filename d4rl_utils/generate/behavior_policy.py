"""Behaviour policies as small arrays: a tanh-Gaussian network evaluated in NumPy for many states at once."""

from pathlib import Path

import numpy as np

MANIFEST = Path(__file__).parent / "policies" / "manifest.json"


class Policy:
    """The stochastic actor of a soft actor-critic, or one of the same form that PPO trained.

    weights: `fc0`, `fc1`, `last_fc`, `last_fc_log_std` × `weight`, `bias`.
    """

    def __init__(self, weights):
        w = {k: np.asarray(v, np.float32) for k, v in weights.items()}
        self.hidden = [(w[f"{k}.weight"].T.copy(), w[f"{k}.bias"]) for k in ("fc0", "fc1")]
        self.mean = (w["last_fc.weight"].T.copy(), w["last_fc.bias"])
        self.log_std = (w["last_fc_log_std.weight"].T.copy(), w["last_fc_log_std.bias"])

    def __call__(self, states: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """States (n, S) float32 and standard normal noise (n, A) -> actions (n, A) in (-1, 1)."""
        x = states
        for weight, bias in self.hidden:
            x = np.maximum(x @ weight + bias, 0)
        mean = x @ self.mean[0] + self.mean[1]
        log_std = np.clip(x @ self.log_std[0] + self.log_std[1], -20, 2)
        return np.tanh(mean + np.exp(log_std) * noise).astype(np.float32)


def ladder_path(env: str) -> Path:
    """The file of a body's ladder, shipped or not."""
    return MANIFEST.with_name(f"{env}-ladder.npz")


def policy_snapshots(env: str) -> list[Policy]:
    """Policies along one training, from the untrained to `medium`, at equal distances in steps.

    A replay buffer's content, nearly: data of which every rung made an equal share of the steps. FileNotFoundError
    without a ladder. The file holds the arrays of a policy, stacked: rung first. The manifest's `<env>-ladder` says how
    many steps each rung had been trained for, and its returns.
    """
    with np.load(ladder_path(env)) as file:
        stacked = dict(file)
    return [Policy({k: v[snapshot] for k, v in stacked.items()}) for snapshot in range(len(stacked["fc0.bias"]))]


def rollout_returns(policy: Policy, env: str, episodes: int, seed: int) -> np.ndarray:
    """Returns (episodes,) of one stochastic episode in each of `episodes` worlds stepped side by side."""
    from d4rl_utils.environment import MAX_EPISODE_STEPS
    from d4rl_utils.generate.vector_env import BatchedMujoco

    envs = BatchedMujoco(env, seed + np.arange(episodes))
    rng = np.random.default_rng(seed)
    returns, live = np.zeros(episodes), np.arange(episodes)
    for _ in range(MAX_EPISODE_STEPS):
        noise = rng.standard_normal((len(live), policy.mean[1].size), np.float32)
        rewards, terminals = envs.step(live, policy(envs.states[live], noise))
        returns[live] += rewards
        live = live[~terminals]
        if not len(live):
            break
    envs.close()
    return returns

"""Behaviour policies as small arrays: a tanh-Gaussian network evaluated in NumPy for many states at once."""

from pathlib import Path

import numpy as np

MANIFEST = Path(__file__).parent / "policies" / "manifest.json"


class Policy:
    """The stochastic actor of a soft actor-critic.

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


def rollout_returns(policy: Policy, env_id: str, episodes: int, seed: int) -> np.ndarray:
    """Returns (episodes,) of one stochastic episode in each of `episodes` environments stepped side by side."""
    import gymnasium as gym

    envs = [gym.make(env_id) for _ in range(episodes)]
    rng = np.random.default_rng(seed)
    states = np.stack([e.reset(seed=seed + i)[0] for i, e in enumerate(envs)]).astype(np.float32)
    returns, live = np.zeros(episodes), np.arange(episodes)
    while len(live):
        actions = policy(states[live], rng.standard_normal((len(live), envs[0].action_space.shape[0]), np.float32))
        over = np.zeros(len(live), bool)
        for j, (i, action) in enumerate(zip(live, actions)):
            states[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            over[j] = terminated or truncated
        live = live[~over]
    for env in envs:
        env.close()
    return returns

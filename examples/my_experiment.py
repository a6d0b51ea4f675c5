"""An environment and data of one's own: train, evaluate, export; from any folder, after pip install -e PATH."""

import gymnasium
import numpy as np

import bamba
from bamba import export


class Line(gymnasium.Env):
    """A point that is pushed along a line and earns more the nearer it is to 0; 50 steps an episode."""

    observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.speed = self.np_random.uniform(-2, 2), 0.0
        return np.array([self.place, self.speed], np.float32), {}

    def step(self, action):
        self.speed = 0.8 * self.speed + 0.2 * float(action[0])
        self.place = float(np.clip(self.place + self.speed, -10, 10))
        return np.array([self.place, self.speed], np.float32), 1 - abs(self.place), False, False, {}


gymnasium.register("Line-v0", Line, max_episode_steps=50)
env, rng, rows = gymnasium.make("Line-v0"), np.random.default_rng(0), []
for episode in range(40):  # a clumsy controller, recorded
    state, _ = env.reset(seed=episode)
    for step in range(50):
        action = np.clip(-state[:1] - state[1:] + rng.normal(0, 0.5, 1), -1, 1)
        after, reward, *_ = env.step(action)
        rows.append((state, action, reward, step == 49, after))
        state = after
states, actions, rewards, cut, after = map(np.array, zip(*rows))
data = bamba.datasets.from_arrays("line.hdf5", states, actions, rewards, np.zeros_like(cut), cut, after)
short = dict(num_epochs=3, updates_per_epoch=300, critic_pretrain=100, learning_rate=1e-3, warmup_steps=100)
run = bamba.train(
    "bamba", [lambda row: print(row["kind"])], env="Line-v0", dataset=data, preset="small", eval_freq=1, **short
)
print(f"mean return: recorded {rewards.sum() / 40:.1f}, learned {bamba.evaluate(run.folder, episodes=20).mean():.1f}")
export.main(["--checkpoint", str(run.folder), "--out", "line.onnx"])  # pip install onnx onnxscript onnxruntime

"""Gymnasium's v4 bodies with steps that go straight to MuJoCo. Needs Gymnasium and MuJoCo.

A part of a step's time goes into what lies around the simulation: layers of wrappers, a state that is copied three
times, contact forces that nobody sees (benchmarks/ppo_speed.py has the times). `BodyEnv` leaves it out. What it returns
is Gymnasium's to the bit, by test.
"""

import math

import gymnasium
import mujoco
import numpy as np

from common.env_spec import EnvFault
from d4rl_utils.sound_env import SoundEnv

ROOT_DIMS = {"HopperEnv": 1, "Walker2dEnv": 1, "HalfCheetahEnv": 1, "AntEnv": 2}  # places in the plane, not shown
SPEED_LIMIT = 10  # of hopper's and walker2d's joints, as they are shown


class BodyEnv(SoundEnv):
    """Hopper-v4, Walker2d-v4, HalfCheetah-v4 or Ant-v4 as `gymnasium.make` returns it, without options of its own.

    Of a step's `info` the two numbers are left that all four have: `x_position` and `x_velocity`.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env, env.spec.max_episode_steps)
        body = env.unwrapped
        self.body, self.model, self.data = body, body.model, body.data
        self.frame_skip, self.dt = body.frame_skip, body.dt
        self.last = env.spec.max_episode_steps
        self.kind, self.root = type(body).__name__, ROOT_DIMS[type(body).__name__]
        self.qpos, self.qvel, self.ctrl = body.data.qpos, body.data.qvel, body.data.ctrl  # views
        self.torso = body.data.body("torso").xpos if self.kind == "AntEnv" else None
        self.shape, self.begun = env.action_space.shape, False

    def reset(self, **options):
        result = super().reset(**options)
        self.begun = True
        return result

    @staticmethod
    def knows(env: gymnasium.Env) -> bool:
        """Whether it is one of the four, without options, and does not draw in every step."""
        body, spec = env.unwrapped, env.spec
        place = type(body).__module__
        known = place.startswith("gymnasium.") and place.endswith("_v4") and type(body).__name__ in ROOT_DIMS
        if not known or body.render_mode == "human" or spec is None:
            return False
        return spec.max_episode_steps is not None and set(spec.kwargs) <= {"render_mode", "camera_name"}

    def step(self, action):
        action = np.asarray(action)
        if action.shape != self.shape or not self.begun:
            return super().step(action)  # which says what is wrong
        self.count += 1
        x = self.qpos if self.torso is None else self.torso
        before = x[0]
        self.ctrl[:] = action
        try:
            mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        except mujoco.FatalError as error:
            raise EnvFault(
                f"{self.name} failed in step {self.count} of the episode with seed {self.episode_seed}: {error}"
            ) from error
        velocity = (x[0] - before) / self.dt
        whole = np.concatenate((self.qpos, self.qvel))
        state, reward, healthy = whole[self.root :], velocity, True
        if self.kind == "HalfCheetahEnv":
            reward = self.body._forward_reward_weight * velocity
        elif self.kind == "AntEnv":
            healthy = self.healthy_ant(whole)
            reward = velocity + self.body._healthy_reward
        else:
            healthy = self.healthy_walker(whole)
            reward = self.body._forward_reward_weight * velocity + self.body._healthy_reward
            speeds = state[len(self.qpos) - self.root :]
            np.maximum(np.minimum(speeds, SPEED_LIMIT, out=speeds), -SPEED_LIMIT, out=speeds)
        reward = float(reward - self.body._ctrl_cost_weight * np.square(action).sum())
        if not math.isfinite(reward):
            self.sound_reward(reward)
        if not math.isfinite(state.sum()):
            self.sound(state)
        return state, reward, not healthy, self.count >= self.last, {"x_position": x[0], "x_velocity": velocity}

    def healthy_walker(self, whole: np.ndarray) -> bool:
        """Hopper's torso is up, and nothing moves too far; of walker2d only the torso counts."""
        body, (z, angle) = self.body, whole[1:3].tolist()
        (low, high), (least, most) = body._healthy_z_range, body._healthy_angle_range
        if self.kind == "HopperEnv":
            rest, (floor, roof) = whole[2:], body._healthy_state_range
            if not (floor < rest.min() and rest.max() < roof):
                return False
        return low < z < high and least < angle < most

    def healthy_ant(self, whole: np.ndarray) -> bool:
        low, high = self.body._healthy_z_range
        return low <= whole[2] <= high and bool(np.isfinite(whole).all())

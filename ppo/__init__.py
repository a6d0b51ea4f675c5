"""PPO (Schulman et al. 2017, arXiv 1707.06347) around a policy that was trained offline, or a new one.

    python trainer.py --agent ppo --init outputs/RUN        bamba, dt, dmamba or dm goes on in its environment
    python trainer.py --agent ppo --init none --env hopper  from scratch

The policy is a Gaussian around the offline agent's action, and what it sees is what that agent sees: the window of the
last K steps, with the returns-to-go that were really asked for. The ratio of probabilities means something only if the
update evaluates the very distribution that acted. So both call the same `forward_window`, with dropout off and
normaliser frozen, on the windows that the rollout stored, and every iteration begins with a proof: the ratio is 1,
or the run stops.

What keeps a good policy good, until the value is worth following: a value that learns first, a sigma that starts at the
policy's distance from the data, KL to the offline policy under a target that loosens, and cloning of the data.

Where we differ from the usual PPO (CleanRL's):
  1. sigma is in half ranges of the action, and bounded; rewards are divided by the spread of discounted returns when
     they are learned from, all of an iteration by the same; a new policy's normaliser moves between iterations only
  2. a policy that sees the time (dt, dmamba, dm) has a value that sees it too, and a time limit ends both, as nothing
     follows it. A policy blind to time cannot tell why episodes end there, so the value of what would have followed
     stands in
  3. an iteration's passes end early by the policy's distance from the one that acted
  4. recurrent rollouts do not exist: checkpoints are fine-tuned as windows, as they were trained, whatever their
     `inference` says
Sigma is calibrated on the data that the policy was trained on; nothing is held out.

  policies    which policy: out of a checkpoint or new, the environment it acts in, the data it is cloned from
  buffer      what an iteration is remembered as
  losses      densities, advantages, the clipped loss
  agent       the agent; its iteration is one page

Letters: T steps of an iteration, n environments, B batch, K context, S state, A action, D embedding.
Contract: common/interface.py.
"""

from ppo.agent import PPO
from ppo.losses import gae, gaussian_kl, gaussian_log_prob
from ppo.policies import MLPPolicy, make_eval_env, resolve_config

__all__ = ["PPO", "MLPPolicy", "gae", "gaussian_kl", "gaussian_log_prob", "make_eval_env", "resolve_config"]

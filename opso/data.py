"""What OPSO learns from and where it lives: settings -> segments with goals, and a maze with five tasks."""

import torch

import ogbench_utils
from common.device import spawn_seeds
from common.interface import EnvSpec, EvalEnv
from ogbench_utils.goal_dataset import Goals, OfflineGoalDataset
from ogbench_utils.names import DIMS

POLICY_TRAJECTORY = {"navigate": 1.0, "stitch": 0.5, "explore": 0.0}  # OGBench's, by the kind of data
FPS = {"pointmaze": 10, "antmaze": 10, "humanoidmaze": 40}


def open_data(cfg, device: torch.device | str, seed: int) -> tuple[OfflineGoalDataset, object]:
    """The sampler on the training device, and what the data are."""
    dataset = ogbench_utils.open_data(cfg)
    sampler = OfflineGoalDataset(
        dataset.episodes,
        cfg.context_length,
        cfg.proposal_steps,
        goals(cfg),
        device,
        seed,
        labelled_fraction(cfg),
        spawn_seeds(cfg.seed, "labels")["labels"],
    )
    return sampler, dataset.identity


def goals(cfg) -> Goals:
    """How goals are drawn for these settings."""
    name = ogbench_utils.name_of(cfg)
    share = cfg.policy_trajectory
    if share is None:
        share = POLICY_TRAJECTORY[ogbench_utils.split_name(name).kind]
    return Goals(
        cfg.goal_current, cfg.goal_trajectory, share, cfg.policy_near, cfg.gamma, ogbench_utils.tolerance_of(name)
    )


def make_eval_env(cfg) -> EvalEnv:
    """OGBench's maze with its five tasks; a score is the share of episodes that reach their goal, in percent."""
    words = ogbench_utils.split_name(ogbench_utils.name_of(cfg))
    state, action = DIMS[words.body]

    def make(render_mode: str | None = None, task: str | None = None):
        return ogbench_utils.make_task(words.environment, task, render_mode)

    return EvalEnv(
        make,
        EnvSpec(state, action, (-1.0,) * action, (1.0,) * action),
        lambda mean: 100 * mean,  # an episode returns 1 if it gets there
        FPS[words.body],
        words.environment,
        f"OGBench's protocol, in percent; f = {labelled_fraction(cfg):g} of the offline episodes showed their actions",
        outcome=lambda info, reward: {"success": info["success"]},
        tasks=ogbench_utils.TASKS,
    )


def labelled_fraction(cfg) -> float:
    """f: the share of the offline episodes whose actions inverse dynamics may use."""
    return 0.0 if cfg.inverse_data == "online" else cfg.inverse_fraction

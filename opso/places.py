"""What OPSO learns from and where it lives: settings -> segments with goals, and a maze with five tasks."""

import torch

import ogbench_utils
from agent import Spec, World
from machine import streams
from ogbench_utils.names import DIMS
from ogbench_utils.segments import Goals, Recorded
from opso.system import labelled_share

POLICY_TRAJECTORY = {"navigate": 1.0, "stitch": 0.5, "explore": 0.0}  # OGBench's, by the kind of data
FPS = {"pointmaze": 10, "antmaze": 10, "humanoidmaze": 40}


def data(cfg, device: torch.device | str, seed: int) -> tuple[Recorded, object]:
    """The sampler on the training device, and what the data are."""
    dataset = ogbench_utils.open_data(cfg)
    share = labelled_share(cfg), streams(cfg.seed, "labels")["labels"]
    return Recorded(dataset.episodes, cfg.context_length, cfg.proposal_steps, goals(cfg), device, seed, *share), (
        dataset.identity
    )


def goals(cfg) -> Goals:
    """How goals are drawn for these settings."""
    name = ogbench_utils.name_of(cfg)
    share = cfg.policy_trajectory
    if share is None:
        share = POLICY_TRAJECTORY[ogbench_utils.split_name(name).kind]
    return Goals(
        cfg.goal_current, cfg.goal_trajectory, share, cfg.policy_near, cfg.gamma, ogbench_utils.tolerance_of(name)
    )


def world(cfg) -> World:
    """OGBench's maze with its five tasks; a score is the share of episodes that reach their goal, in percent."""
    words = ogbench_utils.split_name(ogbench_utils.name_of(cfg))
    state, action = DIMS[words.body]

    def make(render_mode: str | None = None, task: str | None = None):
        return ogbench_utils.make_task(words.environment, task, render_mode)

    return World(
        make,
        Spec(state, action, (-1.0,) * action, (1.0,) * action),
        lambda mean: 100 * mean,  # an episode returns 1 if it gets there
        FPS[words.body],
        words.environment,
        f"OGBench's protocol, in percent; the actions of f = {labelled_share(cfg):g} of the offline episodes were used",
        outcome=lambda info, reward: {"success": info["success"]},
        tasks=ogbench_utils.TASKS,
    )

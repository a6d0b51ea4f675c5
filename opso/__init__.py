"""OPSO."""

import torch

import ogbench_utils
from agent import Spec, World
from machine import streams
from ogbench_utils.segments import Goals, Recorded
from opso.system import Memory, Opso, labelled_share

__all__ = ["Memory", "Opso", "Spec", "data", "world"]

POLICY_TRAJECTORY = {"navigate": 1.0, "stitch": 0.5, "explore": 0.0}  # OGBench's, by the kind of data


def data(cfg, device: torch.device | str, seed: int) -> tuple[Recorded, object]:
    """The sampler on the training device, and what the data are."""
    dataset = ogbench_utils.open_data(cfg)
    name = ogbench_utils.name_of(cfg)
    share = cfg.policy_trajectory
    if share is None:
        share = POLICY_TRAJECTORY[ogbench_utils.split_name(name).kind]
    goals = Goals(cfg.goal_current, cfg.goal_trajectory, share, cfg.gamma, ogbench_utils.tolerance_of(name))
    sampler = Recorded(
        dataset.episodes,
        cfg.context_length,
        cfg.proposal_steps,
        goals,
        device,
        seed,
        labelled_share(cfg),
        streams(cfg.seed, "labels")["labels"],
    )
    return sampler, dataset.identity


def world(cfg) -> World:
    """OGBench's maze with its five tasks."""
    return ogbench_utils.open_world(cfg)

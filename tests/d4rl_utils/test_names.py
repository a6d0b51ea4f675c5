"""The registry, the scores and the light import."""

import csv
import subprocess
import sys

import pytest
from conftest import ROOT

from common.download import Entry
from d4rl_utils import DATASET_TYPES, ENVS, d4rl_score
from d4rl_utils.names import DIMS, REFERENCE_RETURNS, REGISTRY, check_name, split_name

TSV = ROOT.parent / "shared" / "reference_data" / "d4rl_v2_checksums.tsv"


def test_every_body_and_type_has_a_file():
    assert set(REGISTRY) == {f"{body}-{kind}-v2" for body in ENVS for kind in DATASET_TYPES}
    assert set(ENVS) == set(DIMS) == set(REFERENCE_RETURNS)
    assert len({entry.sha256 for entry in REGISTRY.values()}) == len(REGISTRY) == 24


@pytest.mark.skipif(not TSV.exists(), reason="the table of checksums is not beside this repository")
def test_the_registry_is_the_published_table():
    with open(TSV) as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    table = {
        r["dataset"]: Entry(int(r["bytes"]), r["sha256"], r["file"], (r["url_primary"], r["url_mirror"]), "D4RL")
        for r in rows
    }
    assert table == REGISTRY


@pytest.mark.parametrize("env", ENVS)
def test_scores_of_random_and_expert_are_0_and_100(env):
    low, high = REFERENCE_RETURNS[env]
    assert d4rl_score(env, low) == 0 and d4rl_score(env, high) == 100
    assert d4rl_score(env, low - 1) < 0 and d4rl_score(env, high + 1) > 100  # not clipped


def test_scores_by_hand_and_an_unknown_body():
    by_hand = {"hopper": 92.800897, "walker2d": 65.314439, "halfcheetah": 26.420714, "ant": 79.081159}
    assert {env: round(d4rl_score(env, 3000.0), 6) for env in ENVS} == by_hand
    with pytest.raises(ValueError, match="'cheetah'.*hopper, walker2d, halfcheetah, ant"):
        d4rl_score("cheetah", 0.0)


@pytest.mark.parametrize("ending", ["", "-v2", "-local"])
def test_names_are_taken_apart(ending):
    for name in REGISTRY:
        base = name.removesuffix("-v2")
        assert "-".join(split_name(base + ending)) == base


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="'humanoid'.*hopper"):
        check_name("humanoid", "medium")
    with pytest.raises(ValueError, match="'simple'.*medium-replay"):
        check_name("hopper", "simple")
    with pytest.raises(ValueError, match="unknown"):
        split_name("hopper")


def test_importing_is_light():
    heavy = "('torch', 'gymnasium', 'mujoco', 'h5py', 'tqdm')"
    code = f"import sys, d4rl_utils; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""

"""Settings: every number has a range beside it, every field is a flag, what matters comes first in --help."""

from dataclasses import dataclass, fields
from typing import Annotated

import pytest

from config import CONFIGS, BambaConfig, DMConfig, MLPConfig, OPSOConfig, PPOConfig, command_line, groups_of, parse
from config.shared import Count, Range, Share, check_ranges, ranges_of


@pytest.mark.parametrize("config", [*CONFIGS.values(), MLPConfig])
def test_every_number_has_a_range_and_its_default_is_in_it(config):
    ranges = ranges_of(config)
    numbers = [f.name for f in fields(config) if isinstance(f.default, int | float) and not isinstance(f.default, bool)]
    optional = [f.name for f in fields(config) if f.default is None and "dict" not in str(f.type)]
    assert len(numbers) > 0 and not [name for name in numbers + optional if name not in ranges]
    check_ranges(config())


@pytest.mark.parametrize(
    "config, wrong, words",
    [
        (OPSOConfig, {"nce_temperature": 0}, "more than 0"),
        (BambaConfig, {"pct_traj": 2}, "more than 0 and at most 1"),
        (PPOConfig, {"warm_enough": 9}, "from 0 to 1"),
        (PPOConfig, {"sigma": 80}, "from 0.001 to 10"),
        (DMConfig, {"drop_p": 1.0}, "at least 0 and less than 1"),
        (BambaConfig, {"gamma": float("nan")}, "from 0 to 1"),
        (BambaConfig, {"beta_actor": -1.0}, "at least 0"),
        (DMConfig, {"alpha_T": 1.5}, "from 0 to 1"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(config, wrong, words):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} = .* is out of range: take {words}"):
        config(**wrong)


def test_ranges_say_what_they_hold():
    assert 0 in Range(0, 1) and 1 in Range(0, 1) and 1.1 not in Range(0, 1) and float("nan") not in Range(0, 1)
    assert 0 not in Range(0, above=True) and 1 not in Range(0, 1, below=True) and 1e9 in Range(1)
    assert str(Range(0, 1)) == "from 0 to 1" and str(Range(-1)) == "at least -1" and str(Range()) == "any number"


def test_a_field_of_an_agents_own_class_is_a_flag_at_once(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Mine(BambaConfig):
        """Mine."""

        mine: Share = 0.25
        """what only this agent has"""
        depth: Annotated[int, Range(2, 4)] = 3
        """and how deep"""

    monkeypatch.setitem(command_line.CONFIGS, "bamba", Mine)
    assert parse(["--mine", "0.5"]).mine == 0.5 and parse([]).depth == 3
    with pytest.raises(ValueError, match="depth = 5 is out of range: take from 2 to 4"):
        parse(["--depth", "5"])
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert "mine options" in said and "what only this agent has (from 0 to 1)" in said


@pytest.mark.parametrize("agent", CONFIGS)
def test_help_begins_with_what_most_runs_set(agent, capsys):
    with pytest.raises(SystemExit):
        parse(["--agent", agent, "--help"])
    said = capsys.readouterr().out
    first = said.index(" main options "), said.index("--seed"), said.index("--resume")
    rest = [said.index(f" {command_line.title_of(g)} options ") for g in groups_of(CONFIGS[agent])[1:]]
    assert max(first) < min(rest) and rest == sorted(rest)
    if agent.startswith("opso"):
        assert rest[-1] == said.index(" as_published options ")


def test_annotations_of_overridden_fields_are_those_of_the_group():
    assert ranges_of(DMConfig)["batch_size"] == Count.__metadata__[0]

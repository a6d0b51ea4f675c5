"""Every number and every flag, once: these dataclasses are the command line, the help, the record in a checkpoint.

A field is a flag (`--batch_size`), its default the default, the sentence under it the help. Agents inherit the groups
that they share (`class BambaConfig(EncoderConfig, Training, ...)`) and give a field a default of their own by naming it
again; each group is a section of `--help`. `PRESETS` are named overrides, for each agent its own; `ENV_DEFAULTS` are
those that come with an environment's name. Flags win over presets, presets over those, and those over defaults.

`shared` has the groups of several agents, one file each the settings of a system, `command_line` turns them into flags.
"""

from config.bamba import BambaConfig
from config.command_line import CONFIGS, ENV_DEFAULTS, PRESETS, argv_value, groups_of, idle_flags, parse, settings_page
from config.decision import DMambaConfig, DMConfig, DTConfig
from config.dqn import DQNConfig
from config.opso import OPSOConfig, OPSOOnlineConfig
from config.ppo import MLPConfig, PPOConfig

__all__ = ["CONFIGS", "ENV_DEFAULTS", "PRESETS", "BambaConfig", "DMConfig", "DMambaConfig", "DQNConfig", "DTConfig"]
__all__ += ["MLPConfig", "OPSOConfig", "OPSOOnlineConfig", "PPOConfig"]
__all__ += ["argv_value", "groups_of", "idle_flags", "parse", "settings_page"]

"""The toolkit from other code: `import bamba`, from anywhere, beside a project's own utils.py and model.py.

    run = bamba.train(agent="bamba", env="hopper", preset="quick", callbacks=[print])
    policy = bamba.load(run.folder)          # or a file of the zoo
    action = policy.act(state)               # NumPy in, NumPy out; policy.reset() before every episode
    returns = bamba.evaluate(policy, episodes=100)
    dataset = bamba.datasets.open("hopper-medium")

The scripts of the project are its submodules: `bamba.trainer`, `bamba.agent`, `bamba.d4rl_utils` and so on are
trainer.py, agent.py, d4rl_utils/ (bamba/flat_modules.py says how). `python -m bamba` has the scripts' verbs.
"""

import sys

from bamba.flat_modules import Finder

if not any(isinstance(finder, Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder())

from bamba import datasets
from bamba.api import Policy, TrainedRun, evaluate, load, train

__all__ = ["Policy", "TrainedRun", "datasets", "evaluate", "load", "train"]

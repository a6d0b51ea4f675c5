"""The project's scripts and folders as submodules of `bamba`.

They import each other by short names (`import utils`, `from config import parse`), because they are scripts that are
read and edited in place. In here those names must not mean a user's own modules, nor the user's mean ours. So a flat
module that is loaded as `bamba.X` gets an import of its own, by which the names in `FLAT` mean `bamba.NAME`. That holds
for the imports in its functions, too. Nothing else in the process changes: not sys.path, not the builtins of others.
"""

import builtins
import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE / "flat" if (HERE / "flat").is_dir() else HERE.parent  # in a wheel; in a checkout
FLAT = {"agent", "common", "config", "d4rl_utils", "decision_transformer", "dqn", "export", "gym_utils", "model"}
FLAT |= {"networks", "offline_trainer", "ogbench_utils", "online_trainer", "opso", "ppo", "report", "reporting"}
FLAT |= {"sweep", "sweeping", "trainer", "utils"}


def import_flat(name: str, globals=None, locals=None, fromlist=(), level: int = 0) -> ModuleType:
    """`__import__` for flat modules."""
    if level or name.partition(".")[0] not in FLAT:
        return builtins.__import__(name, globals, locals, fromlist, level)
    if fromlist:
        return builtins.__import__(f"bamba.{name}", globals, locals, fromlist, 0)
    importlib.import_module(f"bamba.{name}")
    return sys.modules[f"bamba.{name.partition('.')[0]}"]  # what `import a.b` binds is a


class Loader(SourceFileLoader):
    """Runs a flat module with that import among its builtins."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_flat}
        exec(self.get_code(module.__name__), module.__dict__)


class Finder(MetaPathFinder):
    """Finds `bamba.X` for the names in `FLAT`, and what lies below them."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        top, *parts = fullname.split(".")
        if top != "bamba" or not parts or parts[0] not in FLAT:
            return None
        place = ROOT.joinpath(*parts)
        if (place / "__init__.py").is_file():
            file, inside = place / "__init__.py", [str(place)]
        else:
            file, inside = place.with_suffix(".py"), None
        if not file.is_file():
            return None
        loader = Loader(fullname, str(file))
        return importlib.util.spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=inside)

"""What D4RL's Gym-MuJoCo data are called, where they lie, how to know them, and how a return becomes a score."""

import difflib
from collections.abc import Iterable

from common.download import Entry

ENVS = ("hopper", "walker2d", "halfcheetah", "ant")
DATASET_TYPES = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
MAX_EPISODE_STEPS = 1000  # D4RL's, and where an environment has no limit

# (state dims, action dims). D4RL's ant files have 111 state dims: 27 and 84 contact forces that are zero throughout.
DIMS = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6), "ant": (27, 8)}

# Mean returns of a random policy and of an expert (Fu et al. 2020; d4rl/infos.py): a score of 0 and of 100.
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
    "ant": (-325.6, 3879.7),
}

# What the score of an agent may be called, by the source of what it learned from. Only the first belongs in a table of
# D4RL's scores, whatever scale the others are on.
SCORE_NAMES = {
    "d4rl": "D4RL score",
    "local": "local score",
    "custom": "custom score",
    "minari": "Minari score",
    "online": "online score",
}

# Transitions of D4RL's medium-replay files; the local sets of all other types have 1M (D4RL's: 1M, medium-expert 2M).
REPLAY_TRANSITIONS = {"hopper": 402_000, "walker2d": 302_000, "halfcheetah": 202_000, "ant": 302_000}

MADE_BY = "d4rl_utils.local"  # what local files say that they were made by; it is theirs, wherever the code moves

SERVERS = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/",
)


# fmt: off
_SIZE_AND_SHA256 = {
    "hopper-random": (152525345, "63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054"),
    "hopper-medium": (152756557, "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0"),
    "hopper-medium-replay": (75854457, "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b"),
    "hopper-medium-expert": (304537315, "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26"),
    "hopper-expert": (152427435, "01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b"),
    "hopper-full-replay": (187998921, "56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e"),
    "walker2d-random": (216109364, "4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa"),
    "walker2d-medium": (232254996, "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda"),
    "walker2d-medium-replay": (86323963, "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db"),
    "walker2d-medium-expert": (462197079, "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04"),
    "walker2d-expert": (230567195, "2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a"),
    "walker2d-full-replay": (285115514, "f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a"),
    "halfcheetah-random": (237338037, "25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba"),
    "halfcheetah-medium": (237727262, "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0"),
    "halfcheetah-medium-replay": (59448533, "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683"),
    "halfcheetah-medium-expert": (474567252, "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06"),
    "halfcheetah-expert": (237464597, "d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f"),
    "halfcheetah-full-replay": (291381762, "27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0"),
    "ant-random": (384466831, "93cc10893eed2b8e17f81d1aa51dc23d27c5ca101a3804249f6bd038c6f06055"),
    "ant-medium": (376239825, "461c03b9f70f40d66b47608a92965e4ef3642bd9cdb1320d10acc92754167137"),
    "ant-medium-replay": (136482252, "844c4e5743ef51091f2106a3570b257fb149032c4743f8a5f02f40adc3b42a46"),
    "ant-medium-expert": (748335217, "8cfb64e62d8944b5d9dada5f0cfc13a295fafe0c6ba58b778e32ebf16c95aef1"),
    "ant-expert": (373231677, "fa22531ca79ea051006fa48bb652120d2e12c813919c530369a03c2688311b0f"),
    "ant-full-replay": (449390167, "b95b0a7f34b1d5d1bedfded0f8e9cfc508b59de83cd4cbfb65b18dbd5056f26c"),
}
# fmt: on


def _entry(name: str, size: int, sha256: str) -> Entry:
    body, kind = name.split("-", 1)
    file = f"{body}_{kind.replace('-', '_')}-v2.hdf5"
    return Entry(size, sha256, file, tuple(server + file for server in SERVERS), "D4RL")


# "hopper-medium-v2" -> its file
REGISTRY = {f"{name}-v2": _entry(name, *facts) for name, facts in _SIZE_AND_SHA256.items()}


def check_name(env: str, dataset_type: str) -> str:
    """The base name, e.g. `hopper-medium`, of a body and a dataset type; ValueError if either is unknown."""
    if env not in ENVS:
        raise ValueError(f"unknown env '{env}': D4RL's bodies are {', '.join(ENVS)}{suggest(env, ENVS) or '.'}")
    if dataset_type not in DATASET_TYPES:
        hint = suggest(dataset_type, DATASET_TYPES) or "."
        raise ValueError(f"unknown dataset_type '{dataset_type}': D4RL's are {', '.join(DATASET_TYPES)}{hint}")
    return f"{env}-{dataset_type}"


def split_name(name: str) -> tuple[str, str]:
    """`hopper-medium-replay`, with or without -v2 or -local -> ("hopper", "medium-replay"); ValueError if unknown."""
    body, _, kind = name.removesuffix("-v2").removesuffix("-local").partition("-")
    check_name(body, kind)
    return body, kind


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of an error message about a misspelled `word`: what of the known may have been meant, or nothing."""
    by_lower = {k.lower(): k for k in known}
    found = [by_lower[k] for k in difflib.get_close_matches(word.lower(), by_lower, n=3)]
    return f". Did you mean {' or '.join(found)}?" if found else ""


def usual_transitions(env: str, dataset_type: str) -> int:
    """Transitions of a local data set unless told otherwise: as many as D4RL's, of medium-expert half as many."""
    return REPLAY_TRANSITIONS[env] if dataset_type == "medium-replay" else 1_000_000


def d4rl_score(env: str, value: float) -> float:
    """A return of the body `env` on D4RL's scale: random 0, expert 100. Not clipped: 104 and -1 are information."""
    if env not in REFERENCE_RETURNS:
        raise ValueError(f"no reference returns for '{env}': D4RL's bodies are {', '.join(REFERENCE_RETURNS)}.")
    low, high = REFERENCE_RETURNS[env]
    return 100 * (value - low) / (high - low)

"""Drive an environment with an exported policy: NumPy, onnxruntime and Gymnasium alone.

python export.py --checkpoint outputs/RUN --out hopper.onnx
python examples/act_with_onnx.py hopper.onnx Hopper-v4
"""

import json
import sys

import gymnasium
import numpy as np
import onnxruntime

path, name = sys.argv[1:3]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
policy = json.loads(session.get_modelmeta().custom_metadata_map["policy"])
print(f"{policy['agent']}, learned from {policy['data']['name']}; acts in {policy['environment']}")

env = gymnasium.make(name)
state, _ = env.reset(seed=0)
memory = {k: np.array(v["before_the_first_step"], dtype=v["dtype"]) for k, v in policy["memory"].items()}
taken = {x.name for x in session.get_inputs()}  # a policy that needs no reward does not take one
reward, total, over = 0.0, 0.0, False
while not over:
    inputs = {"state": np.float32(state)[None], "reward": np.float32([reward]), **memory}
    action, *after = session.run(None, {k: v for k, v in inputs.items() if k in taken})
    memory = dict(zip(policy["memory"], after))
    state, reward, terminated, truncated, _ = env.step(action[0])
    total += reward
    over = terminated or truncated
print(f"return {total:.1f}")

"""ComfyUI's own layers: those that hold their weights are plain, those that cast, patch or quantise in the call are not."""

from __future__ import annotations

import json
import os
import subprocess

from tests.host import NEEDS_HOST, PACK

pytestmark = NEEDS_HOST

SCRIPT = """
import json
import sys

path, pack = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path[:0] = [path]
sys.path.append(pack)
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.ops
from flowcache_core.models.layers import plain

def of(ops):
    return ops.Linear(16, 16, dtype=torch.bfloat16), ops.RMSNorm(16, dtype=torch.bfloat16), ops.LayerNorm(16, elementwise_affine=False)

held, patched = of(comfy.ops.disable_weight_init), of(comfy.ops.disable_weight_init)
for layer in patched:
    layer.weight_function = [lambda weight: weight]
kinds = {"held": held, "patched": patched, "cast": of(comfy.ops.manual_cast), "fp8": of(comfy.ops.fp8_ops)}
if hasattr(comfy.ops, "mixed_precision_ops"):
    kinds["mixed"] = (comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear(16, 16, dtype=torch.bfloat16),)
x = torch.zeros(1, 2, 16, dtype=torch.bfloat16)
with torch.no_grad():
    print(json.dumps({kind: [plain(layer, x) for layer in layers] for kind, layers in kinds.items()}))
"""


def test_layers_of_the_host_are_plain_where_they_hold_their_weights() -> None:
    done = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], "-c", SCRIPT, os.environ["COMFYUI_PATH"], str(PACK)],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("held") == [True] * 3
    assert not any(any(each) for each in found.values()), found

"""`import lightning_gradflow` costs little beside Lightning's own import."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys
import lightning
before = set(sys.modules)
import lightning_gradflow
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
HEAVY = {"wandb", "matplotlib", "plotly", "rich", "tensorboard", "tensorboardX", "sklearn", "scipy", "pandas"}


def test_nothing_heavy_is_loaded_beyond_what_lightning_loads():
    # Lightning and torchmetrics may load some of these themselves: only what comes on top counts
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    loaded = set(json.loads(said.stdout.splitlines()[-1]))
    assert "lightning_gradflow" in loaded
    assert loaded & HEAVY == set()

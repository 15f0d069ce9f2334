"""Every process of a multi-host run must lower the same program, whatever its hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import hashlib
import tests.conftest
import jax, jaxpar
from tests.zoo import CASES
for name in ("mlp", "integers_and_keys", "gpt_remat"):
    case = CASES[name]()
    mesh = jax.make_mesh((4, 2), ("stage", "data"))
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4)
    text = step.lower(case.state, case.batch, *case.extra).as_text()
    print(name, hashlib.sha256(text.encode()).hexdigest())
"""


def test_lowering_does_not_depend_on_the_process():
    root = Path(__file__).parents[2]

    def lower(seed: int) -> str:
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(root)}
        result = subprocess.run([sys.executable, "-c", _SCRIPT], env=env, cwd=root, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert lower(1) == lower(2)

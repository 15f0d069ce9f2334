"""Every test sees eight emulated CPU devices and 64-bit numbers."""

import os

# XLA reads these when its backend starts.
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_backend_optimization_level=0",  # the tests compile far longer than they run
    # A collective that not every device reaches hangs: fail instead.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=60",
    "--xla_cpu_collective_call_terminate_timeout_seconds=240",
    os.environ.get("XLA_FLAGS", ""),  # of two settings of a flag the last one counts
])  # fmt: skip

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("jaxpar", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("jaxpar")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)


def pytest_collection_modifyitems(items):
    """With `--dist loadgroup`, tests of one case of the zoo share a worker and so its reference; others go by file."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        group = f"case {params['name']}" if params and isinstance(params.get("name"), str) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))

"""The GPT's pipelined step, compiled for a TPU and for a GPU that are not there.

    pip install libtpu                                                  for the TPU
    pip install jax-cuda13-plugin nvidia-nvvm nvidia-cuda-nvcc          for the GPU; the plugin of jax's own version

What the compilers make of it is read from their final, scheduled programs.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

import jaxpar
from benchmarks.gpt import Config, init_state, make_batch, train_step
from tests.hlo import Hlo, arrivals, check_pipeline, check_rings, overlapped, parse_hlo, ticks_body

CONFIG = Config(num_layers=4, dim=128, heads=4, vocab=256, length=64, batch_size=32)
MESH = {"stage": 4, "data": 2}
NUM_MICROBATCHES = 8

# What XLA needs to know of a GPU: NVIDIA's H100 SXM, from its data sheet and the CUDA programming guide's table for
# compute capability 9.0.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  device_memory_size: 85899345920
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def require(module: str) -> None:
    """Skip where the module that brings the compiler is not installed."""
    package, _, _ = module.partition(".")
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: no compiler for this target")


def tpu_devices(topology: str = "v5e:2x4") -> Any:
    """The devices of a TPU slice."""
    require("libtpu")
    # Don't ask a cloud's metadata server which TPU this is, and let several processes load the library.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def gpu_devices(topology: str = "1x1x8") -> Any:
    """The devices of `slices x hosts x GPUs per host`."""
    require("jax_plugins.xla_cuda13")
    return topologies.get_topology_desc(platform="cuda", topology=topology, target_config=H100).devices


def compile_gpt(devices: Any, dtype: Any = jnp.float32, **options: Any) -> Any:
    """The compiled step for a mesh of these devices."""
    mesh = Mesh(np.asarray(devices).reshape(*MESH.values()), tuple(MESH))
    step = jaxpar.parallelize(train_step, mesh=mesh, num_microbatches=NUM_MICROBATCHES, **options)
    with jax.enable_x64(False):
        state = jax.eval_shape(partial(init_state, CONFIG))
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.dtype == jnp.float32 else x.dtype)
        return step.lower(jax.tree.map(cast, state), make_batch(CONFIG)).compile()


def check_program(compiled: Any) -> Hlo:
    """What holds on every target."""
    hlo, machine = parse_hlo(compiled.as_text()), compiled.built.machine
    check_pipeline(hlo, machine)
    check_rings(hlo, machine)
    assert hlo.ops_in(ticks_body(hlo), opcode="all-reduce.*|reduce-scatter.*|all-gather.*|all-to-all.*") == []
    return hlo


def check_donated(compiled: Any) -> None:
    """The new state is in the old one's memory."""
    state = compiled.built.layouts[0].packing.bytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < 1.1 * state


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu(dtype):
    compiled = compile_gpt(tpu_devices(), dtype)
    hlo = check_program(compiled)
    assert overlapped(hlo) == len(arrivals(hlo)) > 0, "a transfer that a tick has to wait for"
    check_donated(compiled)


@pytest.mark.aot
@pytest.mark.parametrize("devices", [tpu_devices, gpu_devices])
def test_unequal_replicas(devices):
    """Values between stages of 1, 2 and 1 ranks, and totals over groups of unequal size."""
    compiled = compile_gpt(devices(), replicas=(1, 2, 1))
    check_program(compiled)
    check_donated(compiled)


@pytest.mark.aot
def test_gpu():
    compiled = compile_gpt(gpu_devices())
    hlo = check_program(compiled)
    assert overlapped(hlo) >= 1, (
        "by default XLA:GPU keeps one collective in flight: not even that one hides behind work"
    )
    check_donated(compiled)

"""Settings that must stand before JAX is imported: eight CPU devices, what saves time."""

import gc
import os
from pathlib import Path

import threadpoolctl

# Compiling takes most of the tests' time: LLVM's optimisations cost more than they save, and the
# older of XLA's two ways to emit fused loops (gone in jax 0.12, where this changes nothing) takes
# a third of the newer one's time.
_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
_CACHE = Path(__file__).parents[1] / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# The processes of a test run share the cores: threads of PyTorch and BLAS would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without worker processes a plugin may have loaded NumPy before it could read this.
threadpoolctl.threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Tracing makes very many objects and little garbage: looking for it took a fifth of the time.
gc.set_threshold(50_000)

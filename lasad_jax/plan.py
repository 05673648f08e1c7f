"""Says what a run needs before it is paid for, on a machine that is not at hand:

    python -m lasad_jax.plan --config=configs/imagenet256.py:XL --topology=v5e-256 \\
        --batch_size=1024 --config.mesh.fsdp=16

compiles the run's own training step for a TPU slice (with libtpu: pip install "jax[tpu]") or an
H100 or H200 host (pip install "jax[cuda13]") and prints memory by kind, FLOPs, bytes over the
interconnect, what bounds a step, and the largest batch that fits; --json prints all numbers.
Where the compiler is not installed, or with --nocompile, the same by arithmetic. A step takes a
minute or more to compile. --table plans the README's sizes and machines, or of these --topology.
"""

import dataclasses
import json
import os

import jax
from absl import flags
from ml_collections import config_flags

from lasad_jax.benchmarks.tables import head, one_line, row_line
from lasad_jax.command import run
from lasad_jax.config import build_config
from lasad_jax.planning.planner import make_plan
from lasad_jax.planning.report import LARGEST, TABLE, describe
from lasad_jax.planning.sizes import MACHINES, table_runs
from lasad_jax.planning.topologies import find_topology

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e-256, v5p-64, v6e-64, gpu:8x80GB, ...")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images per step; the config's if unset.")
_SEARCH = flags.DEFINE_bool("search", True, "Find the largest batch that fits.")
_TRIES = flags.DEFINE_integer("tries", 4, "Batches to compile for that.", 1)
_COMPILE = flags.DEFINE_bool("compile", None, "Compile; by default where the compiler is.")
_JSON = flags.DEFINE_bool("json", False, "Print all numbers as JSON; of --table, a line a run.")
_TABLE = flags.DEFINE_bool("table", False, "Plan the README's sizes on its machines.")


def plan() -> None:
    """Plans what the flags ask for."""
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise ValueError("plan: give --config and --topology, or --table")
    config, topology = build_config(_CONFIG.value), find_topology(_TOPOLOGY.value)
    if _BATCH_SIZE.value is not None:
        config = dataclasses.replace(config, batch_size=_BATCH_SIZE.value)
    row = _plan(config, topology).row()
    print(json.dumps(row, indent=2) if _JSON.value else describe(row))


def table() -> None:
    """Plans many runs, a row each as it comes; one that fails says why, and the others go on."""
    machines = [_TOPOLOGY.value] if _TOPOLOGY.value else [*MACHINES]
    columns = [c for c in TABLE if _SEARCH.value or c is not LARGEST]
    if not _JSON.value:
        print(head(columns))
    for machine in machines:
        topology = find_topology(machine)
        if machine not in MACHINES:
            raise ValueError(f"table: topology {machine!r} is not one of {[*MACHINES]}")
        for size, config in table_runs(machine, topology.num_devices):
            row = {"size": size, "topology": machine}
            try:
                row |= _plan(config, topology).row()
            except ValueError as error:
                row["skipped"] = one_line(error)
            print(json.dumps(row) if _JSON.value else row_line(row, columns), flush=True)


def _plan(config, topology):
    return make_plan(
        config, topology, compiled=_COMPILE.value, search=_SEARCH.value, most_tries=_TRIES.value
    )


def main() -> None:
    # Nothing runs, so no accelerator is opened; programs for others cannot be stored.
    jax.config.update("jax_enable_compilation_cache", False)
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    table() if _TABLE.value else plan()


if __name__ == "__main__":
    run(main)

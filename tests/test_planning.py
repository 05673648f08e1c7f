"""Plans: machines, the search for the largest batch, arithmetic, and compiled steps."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT, environment, tiny_config

from lasad_jax.models import count_parameters
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.planning import planner, topologies
from lasad_jax.planning.arithmetic import estimate_step
from lasad_jax.planning.chips import H100, V5E, usable_memory
from lasad_jax.planning.collectives import collective
from lasad_jax.planning.compiling import (
    Memory,
    OutOfMemoryError,
    Step,
    compile_step,
    needed_memory,
)
from lasad_jax.planning.planner import make_plan, mesh_of
from lasad_jax.planning.plans import bottleneck, find_largest, fits, least_seconds, round_batch
from lasad_jax.planning.report import TABLE, describe
from lasad_jax.planning.sizes import MACHINES, TABLE_SIZES, table_runs
from lasad_jax.planning.topologies import Topology, find_topology
from lasad_jax.training import sharding
from lasad_jax.training.sharding import batch_parts
from lasad_jax.training.state import abstract_state

# Machines


@pytest.mark.parametrize(
    ("name", "kind", "shape", "devices"),
    [
        ("v5e-256", "TPU v5 lite", "16x16", 256),
        ("v5p-64", "TPU v5", "2x4x4", 32),  # named by cores
        ("v6e-64", "TPU v6 lite", "8x8", 64),
        ("gpu:8x80GB", "NVIDIA H100 80GB HBM3", "8", 8),
        ("gpu:1x141GB", "NVIDIA H200", "1", 1),
    ],
)
def test_names_of_machines(name, kind, shape, devices):
    topology = find_topology(name)
    assert (topology.chip.kind, topology.shape) == (kind, shape)
    assert topology.num_devices == devices


@pytest.mark.parametrize(
    "name", ["v5e-100", "v5p-4", "v3-8", "gpu:3x80GB", "gpu:8x24GB", "v5e", ""]
)
def test_unknown_machines_are_refused_with_a_list(name):
    with pytest.raises(ValueError, match=rf"topology: {name!r} is not one of v5e-4, .*gpu:8x80GB"):
        find_topology(name)


def test_every_known_name_is_found_and_multiplies():
    for name in topologies.known_topologies():
        topology = find_topology(name)
        number = int(re.search(r"\d+", name.split("-")[-1].split(":")[-1]).group())
        assert topology.num_devices == (number // 2 if name.startswith("v5p") else number)


# Bounds and the largest batch


def step_of(batch, *, fixed=1e9, per_image=1e8, **changes):
    made = {"flops": 1e12, "traffic": None, "collectives": (), "compiled": False} | changes
    return Step(batch, Memory(fixed, 0.0, per_image * batch, 0.0), **made)


def test_the_bound_that_takes_longest_is_the_bottleneck():
    ring = (collective("all-gather", 5, 2, 25e9),)  # 100 GB sent
    step = step_of(1, flops=197e12 / 2, traffic=819e9 / 4, collectives=ring)
    assert least_seconds(step, V5E) == pytest.approx(
        {"compute": 0.5, "memory bandwidth": 0.25, "interconnect": 1.0}
    )
    assert bottleneck(step, V5E) == "interconnect"
    alone = dataclasses.replace(step, collectives=())
    assert bottleneck(alone, V5E) == "compute"
    unknown = dataclasses.replace(alone, traffic=None)
    assert bottleneck(unknown, V5E) == "compute or memory bandwidth"


def test_memory_that_jax_gives_to_programs(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert usable_memory(H100) == 0.75 * H100.memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert usable_memory(H100) == 0.95 * H100.memory
    assert usable_memory(V5E) == V5E.memory


@settings(deadline=None, max_examples=200)
@given(
    fixed=st.floats(1e8, 1.4e10),
    per_image=st.floats(1e6, 4e9),
    curved=st.floats(0.0, 0.3),
    first=st.integers(1, 512),
    refuses=st.sampled_from(["never", "silently", "saying"]),
    known=st.booleans(),
)
def test_the_largest_batch_is_found(fixed, per_image, curved, first, refuses, known):
    limit, seen = usable_memory(V5E), []

    def make(batch):
        # Never quite a line.
        return step_of(batch, fixed=fixed, per_image=per_image * (1 + curved / batch))

    def measure(batch):
        seen.append(batch)
        step = make(batch)
        if refuses != "never" and step.memory.total > limit:
            raise OutOfMemoryError(step.memory.total if refuses == "saying" else None)
        return step

    known &= refuses == "never"
    found = find_largest(measure, V5E, make(first) if known else first, most_tries=30)
    assert len(seen) == len(set(seen)) == found.tries <= 30
    if found.step is None:
        assert make(1).memory.total > limit
        return
    assert found.step == make(found.step.batch)
    assert fits(found.step, V5E)
    full = found.step.memory.total >= 0.9 * limit
    close = found.too_many and found.too_many - found.step.batch <= max(1, 0.1 * found.too_many)
    assert full or close
    if found.too_many:
        assert make(found.too_many).memory.total > limit


def test_a_line_takes_three_steps():
    found = find_largest(step_of, V5E, 4)
    assert found.tries == 3
    # (16.91 - 1) GB at 0.1 GB an image.
    assert found.step.batch == round_batch(159) == 144


# Arithmetic


@pytest.fixture(scope="module")
def on_eight():
    """A run, its step compiled for eight CPU devices, and the same by arithmetic."""
    config = tiny_config(batch_size=32, mesh={"data": 2, "fsdp": 4}, model={"vocab_size": 24})
    topology = Topology("eight", dataclasses.replace(V5E, kind="cpu", platform="cpu"), "8")
    return config, topology, compile_step(config, jax.devices()), estimate_step(config, topology)


def test_arguments_are_the_bytes_of_the_state_on_a_device(on_eight):
    config, _, compiled, estimated = on_eight
    state = abstract_state(config, sharding.make_mesh(config.mesh))
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)]
    # Of 32 images each pair of (data, fsdp) has 4: 64 codes and a label.
    want = 4 * sum(int(np.prod(shard)) for shard in shards) + 4 * 4 * 65
    assert estimated.memory.arguments == want
    assert compiled.memory.arguments == want
    # Parameters, two moments, the average: a quarter of each, but for what does not divide.
    assert want == pytest.approx(4 * 4 * count_parameters(config.model) / 4, rel=0.3)


def test_a_compiled_step_and_arithmetic_agree(on_eight):
    _, _, compiled, estimated = on_eight
    assert (compiled.batch, estimated.batch) == (4, 4)
    assert (compiled.compiled, estimated.compiled) == (True, False)
    assert compiled.traffic > compiled.memory.arguments
    # Unoptimised programs for CPUs hold more than differentiation keeps, but not much more.
    assert 1 <= compiled.memory.temporaries / estimated.memory.temporaries < 4
    # The operator's plain form has products that its formula leaves out.
    assert 1 <= compiled.flops / estimated.flops < 2.5
    # Parameters once, but for vectors.
    gathered = lambda step: sum(x.sent for x in step.collectives if x.kind == "all-gather")
    assert gathered(compiled) == pytest.approx(gathered(estimated), rel=0.01)


def test_a_loop_of_layers_gathers_once_a_layer(on_eight):
    config, _, compiled, estimated = on_eight
    model = config.model
    # The content gate's column is filled up to eight in each head of both layers.
    filled = 2 * model.width * model.num_heads * 7
    # On all devices: of both layers each head's two rates and gate's bias, and norms of heads, of
    # which there are too few.
    whole = 2 * (3 + model.value_dim) * model.num_heads
    parameters, whole = 4 * (count_parameters(model) + filled - whole), 4 * whole
    ring = {x.kind: x for x in estimated.collectives}
    assert ring["all-gather"] == collective("all-gather", 4, 2, parameters / 4)
    assert ring["reduce-scatter"] == collective("reduce-scatter", 4, 2, parameters)
    assert ring["all-reduce"] == collective("all-reduce", 2, 2, parameters / 4 + whole)
    # XLA on CPUs adds up whole gradients and then takes slices.
    groups = {(x.kind, x.group) for x in compiled.collectives}
    assert ("all-gather", 4) in groups


def test_meshes_and_batches_that_do_not_divide_are_refused(on_eight):
    config, topology, *_ = on_eight
    bad = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=3))
    with pytest.raises(ValueError, match=r"mesh: .*does not multiply to the 8 devices of eight"):
        mesh_of(bad.mesh, topology)
    with pytest.raises(ValueError, match=r"batch_size: 36 must be a multiple of 8"):
        estimate_step(dataclasses.replace(config, batch_size=36), topology)
    free = dataclasses.replace(config.mesh, data=-1)
    assert batch_parts(mesh_of(free, topology)) == 8


@pytest.mark.parametrize(
    ("machine", "spec"),
    [("v5e-8", (None, "tensor", "fsdp")), ("gpu:8x80GB", (None, ("tensor", "fsdp"), None))],
)
def test_parts_are_planned_where_the_machine_stores_them(machine, spec):
    config = tiny_config(batch_size=32, mesh={"data": 2, "fsdp": 4})
    mesh = mesh_of(config.mesh, find_topology(machine))
    placed = sharding.tree_shardings(abstract_parameters(config.model), mesh)
    assert tuple(placed["blocks"]["ffn"]["down"]["kernel"].spec) == spec


# Reports


def test_a_plan_in_words_and_numbers(on_eight, capsys):
    config, topology, *_ = on_eight
    topology = find_topology("v5e-8")
    plan = make_plan(config, topology, compiled=False)
    said = capsys.readouterr()
    assert said.out == ""
    assert "v5e-8: 4 images per device" in said.err
    row = json.loads(json.dumps(plan.row()))
    assert row["fits"]
    assert row["step"]["bytes"] == sum(row["step"]["memory"].values())
    assert row["largest"]["step"]["bytes"] <= row["usable_memory"]
    assert row["largest"]["step"]["batch"] > 100
    text = describe(row)
    for part in (
        "8 x TPU v5 lite, mesh data 2, fsdp 4",
        "4 images per device",
        "fits",
        "by arithm",
    ):
        assert part in text
    assert f"bound by {row['step']['bottleneck']}" in text
    assert "largest batch that fits" in text
    cells = {c.name: c.cell({"size": "tiny"} | row) for c in TABLE}
    assert cells["mesh"] == "data 2 x fsdp 4"
    assert (cells["batch"], cells["how"]) == ("4", "arithmetic")


def test_a_step_that_does_not_fit_is_said_so(on_eight, monkeypatch):
    config, *_ = on_eight
    small = dataclasses.replace(V5E, memory=1e5)
    plan = make_plan(config, Topology("small", small, "8"), compiled=False)
    assert not plan.fits
    text = describe(json.loads(json.dumps(plan.row())))
    assert "does not fit" in text
    assert "no batch that was tried fits" in text


def test_what_a_compiler_refuses_is_searched_below(on_eight, monkeypatch):
    """TPU's compiler returns no program that does not fit, and says what it would have taken."""
    config, *_ = on_eight
    per_image, refused = usable_memory(V5E) / 10, []

    def compile_fake(config, devices):
        batch = config.batch_size // 8
        if batch > 9:
            refused.append(batch)
            raise OutOfMemoryError(1e9 + batch * per_image)
        return step_of(batch, per_image=per_image)

    monkeypatch.setattr(planner, "compile_step", compile_fake)
    monkeypatch.setattr(Topology, "devices", lambda self: [])
    large = dataclasses.replace(config, batch_size=8 * 24)
    plan = make_plan(large, find_topology("v5e-8"), compiled=True)
    assert refused[0] == 24
    assert plan.largest.step.batch == 9
    assert (plan.step, plan.fits, plan.batch) == (None, False, 24)
    text = describe(json.loads(json.dumps(plan.row())))
    assert "does not fit: 41.6 GB needed, 16.9 GB usable" in text
    assert "largest batch that fits: 9 images per device" in text


def test_memory_that_tpus_compiler_says_is_needed():
    said = "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    assert needed_memory(said + "Used 20.50G of 15.75G hbm. Exceeded by 4.75G.") == 20.5 * 2**30
    assert needed_memory("required for HLO temporaries (768.01M) exceeds") == 768.01 * 2**20
    assert needed_memory("something else") is None


def test_the_readmes_runs_divide():
    for machine in MACHINES:
        topology = find_topology(machine)
        runs = dict(table_runs(machine, topology.num_devices))
        assert tuple(runs) == TABLE_SIZES
        for config in runs.values():
            mesh = mesh_of(config.mesh, topology)
            sharding.check_batch_size(config.batch_size, 1, mesh)
            assert config.batch_size // batch_parts(mesh) == MACHINES[machine][0]


def test_the_command():
    def run(*flags):
        return subprocess.run(
            [sys.executable, "-m", "lasad_jax.plan", "--config=tests/tiny.py", *flags],
            cwd=ROOT,
            env=environment(1),
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("--topology=v5p-8", "--batch_size=64", "--nocompile", "--nosearch", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["devices"], row["batch"], row["topology"]) == (4, 16, "v5p-8")
    failed = run("--topology=v5p-7")
    assert failed.returncode == 1
    assert "ValueError: topology: 'v5p-7' is not one of" in failed.stderr
    assert "Traceback" not in failed.stderr


# Compilers of devices that are not at hand


def test_a_missing_compiler_is_named(on_eight, monkeypatch):
    config, *_ = on_eight
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    for machine, package in (("v5e-8", "libtpu"), ("gpu:8x80GB", "jax.cuda13")):
        with pytest.raises(ImportError, match=rf"{machine} is compiled for by .*{package}"):
            make_plan(config, find_topology(machine), compiled=True)
        assert not topologies.can_compile(find_topology(machine))


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("machine", ["v5e-8", "gpu:8x80GB"])
def test_compiles_for_machines_that_are_not_at_hand(machine, on_eight):
    config, *_ = on_eight
    topology = find_topology(machine)
    if not topologies.can_compile(topology):
        pytest.skip(f"the compiler for {machine} is not installed")
    step = compile_step(config, topology.devices())
    estimated = estimate_step(config, topology)
    assert step.batch == 4
    # TPUs pad arrays this small to whole tiles.
    assert step.memory.arguments >= estimated.memory.arguments
    assert step.flops == pytest.approx(estimated.flops, rel=0.5)
    assert {x.kind for x in step.collectives} >= {"all-gather", "all-reduce"}


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_tpus_compiler_says_what_does_not_fit():
    pytest.importorskip("libtpu", reason="libtpu, TPU's compiler, is not installed")
    (device, *_) = find_topology("v5e-4").devices()
    where = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((2**17, 2**17), np.float32, sharding=where)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: jax.numpy.sort(x, axis=0) @ x.T).lower(large).compile()
    assert "RESOURCE_EXHAUSTED" in str(caught.value)
    assert needed_memory(str(caught.value)) > 2**36

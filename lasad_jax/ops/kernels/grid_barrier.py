"""Waiting for other programs of the same launch, through counters in global memory (Mosaic GPU).

Every program must be on a multiprocessor at once, or who waits holds the place of whom it waits
for, as when two processes share a GPU under MPS and each holds a part of it. So nobody waits longer
than about ten seconds: the launch then ends with a CUDA error ("unspecified launch failure" or
"illegal instruction"), after which the process can use the GPU no more. Start it again with the
GPU to itself, or with a form that takes no such launch.

Launches that follow each other count by turns in one of two sets of counters, and each clears what
the one before has counted in, which has ended: so nobody need be waited for at the end.
"""

import dataclasses

import jax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

_REF = plgpu.RefType()
_MOST_POLLS = 1 << 25  # about ten seconds


@dataclasses.dataclass(frozen=True)
class Phases:
    """Parts of a launch's work, each done when every program has signalled it.

    Attributes:
      counters: (n, stride) int32: one for each phase, zeros when the launch begins.
      programs: how many there are.
      barriers: of each phase, in place of counters where one cluster is all of the launch, as in
        the interpreter.
    """

    counters: jax.Ref
    programs: int
    barriers: jax.Ref | None = None

    def signal(self, phase: int) -> None:
        """As `grid_barrier.signal`."""
        if self.barriers is None:
            signal(self.counters.at[phase])
        else:
            plgpu.barrier_arrive(self.barriers.at[phase])

    def wait(self, phase: int) -> None:
        """Until all have signalled it. Bulk copies may then read what they wrote."""
        if self.barriers is None:
            wait(self.counters.at[phase], self.programs)
        else:
            plgpu.barrier_wait(self.barriers.at[phase])


def signal(counter: jax.Ref) -> None:
    """Counts one warpgroup that has written all it had to; who waits then sees what it wrote.

    Bulk copies must have been waited for.

    Args:
      counter: (stride,) int32, of which the first counts.
    """

    @plgpu.inline_mgpu(arg_types=(_REF,))
    def add(_, counter):
        _release()
        mgpu.SemaphoreRef(mgpu.memref_ptr(counter)).signal(1, memory_scope="gpu")

    add(counter)


def wait(counter: jax.Ref, count: int) -> None:
    """Until `count` warpgroups have signalled. Bulk copies may then read what they wrote."""

    @plgpu.inline_mgpu(arg_types=(_REF,))
    def spin(_, counter):
        mgpu.inline_ptx(
            "{ .reg .pred done; .reg .b32 seen, polls; mov.b32 polls, 0; @!$1 bra released;"
            "poll: ld.relaxed.gpu.global.b32 seen, [$0];"
            f"setp.ge.u32 done, seen, {count}; @done bra acquired;"
            f"add.u32 polls, polls, 1; setp.lt.u32 done, polls, {_MOST_POLLS}; @done bra poll;"
            "trap; acquired: fence.acquire.gpu; released: }",
            mgpu.memref_ptr(counter),
            mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP),
            has_side_effects=True,
        )
        mgpu.warpgroup_barrier()
        _order_bulk_copies()

    spin(counter)


def clear(counters: jax.Ref) -> None:
    """Makes counters zero that no program of this launch counts in, for the launch after it.

    Args:
      counters: (n, stride) int32.
    """
    places = range(0, 4 * counters.size, 4 * counters.shape[1])

    @plgpu.inline_mgpu(arg_types=(_REF,))
    def store(_, counters):
        mgpu.inline_ptx(
            " ".join(f"@$1 st.global.b32 [$0+{place}], 0;" for place in places),
            mgpu.memref_ptr(counters),
            mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP),
            has_side_effects=True,
        )

    store(counters)


def _release():
    """What all threads of the warpgroup wrote, for bulk copies too, comes before what follows."""
    _order_bulk_copies()
    mgpu.warpgroup_barrier()


def _order_bulk_copies():
    """Those after it see what was written before it. Not of shared memory too: that would wait."""
    mgpu.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

"""What is compared: tasks, and the mixers and their parts as arms named by what they have."""

import dataclasses
import itertools
from collections.abc import Sequence

from lasad_jax.benchmarks.mixer_names import model_fields
from lasad_jax.benchmarks.tables import check_known
from lasad_jax.models import SIZES

SOFTMAX = "softmax+rope"
SOFTMAX_CONV = "softmax+conv+rope"
DEFAULT = "raster+gate+conv+rope"


@dataclasses.dataclass(frozen=True)
class Task:
    """Attributes:
    config: file in configs/, without ending.
    title: for people.
    overfits: images repeat so often that the best step counts, not the last.
    fields: of its config, that differ.
    """

    config: str
    title: str
    overfits: bool = False
    fields: dict[str, str] = dataclasses.field(default_factory=dict)


TASKS = {
    "fashion": Task("fashion_mnist", "Fashion-MNIST, 28x28 pixels of 32 levels"),
    "han": Task("han", "Han characters, 24x24 pixels of 8 levels"),
    "clipart": Task("clipart", "Open Clip Art, 16x16 of 1024 codes", overfits=True),
}


def _larger(size: str, learning_rate: float) -> Task:
    fields = {f"model.{name}": str(value) for name, value in SIZES[size].items()}
    fields |= {"optimizer.learning_rate": str(learning_rate)}
    return Task("han", f"Han characters, size {size}", fields=fields)


# The largest task at larger sizes; its rate goes with one over the width.
SCALING = {"han-medium": _larger("medium", 1.33e-3), "han-B": _larger("B", 6.7e-4)}
TASKS |= SCALING

# Those of the tables: the default, the baselines, and the decays and gates beside the default.
BEST = (
    DEFAULT,
    SOFTMAX,
    SOFTMAX_CONV,
    "raster+gate+conv+rope+dk64",
    "raster+conv+rope",
    "manhattan+conv+rope",
    "sequence+gate+conv+rope",
    "none+conv+rope",
)
# With everything that each decay can be had with or without.
ARMS = (
    *BEST,
    "raster+gate+conv+rope+dk16",
    "raster+gate+rope",
    "raster+gate+conv",
    "sequence+conv+rope",
    "none+gate+conv+rope",
    "none+rope",
    "none",
    *(
        f"{decay}{gate}{rest}"
        for decay, gate in (
            ("raster", ""),
            ("sequence", "+gate"),
            ("sequence", ""),
            ("manhattan", ""),
        )
        for rest in ("+rope", "+conv", "")
    ),
    "raster+gate",
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the comparison.

    Attributes:
      task: of `TASKS`.
      arm: as `model_fields` reads it.
      seed: of the run.
    """

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder below that of all."""
        return f"{self.task}/{self.arm}/seed{self.seed}"

    def flags(self) -> list[str]:
        """For `lasad_jax.train`."""
        task = TASKS[self.task]
        fields = {"seed": self.seed} | task.fields
        fields |= {f"model.{name}": value for name, value in model_fields(self.arm).items()}
        given = [f"--config.{name}={value}" for name, value in fields.items()]
        return [f"--config=configs/{task.config}.py", *given]


def trials(tasks: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """All of them, one seed after the other.

    Raises:
      ValueError: for a task or an arm that there is not.
    """
    check_known("tasks", tasks, tuple(TASKS))
    for arm in arms:
        model_fields(arm)
    return [Trial(task, arm, seed) for seed, arm, task in itertools.product(seeds, arms, tasks)]

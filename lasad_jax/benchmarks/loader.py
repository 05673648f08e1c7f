"""Times the loader on stored codes of random images.

    python -m lasad_jax.benchmarks.loader [--images=100000] [--augmentations=10] [--tokens=256]

Writes the codes to a temporary folder, by default in as many shards as ImageNet's though
smaller ones, and prints samples a second of `train_batches` and, to show what bounds it, of
each step below it. The files are then in the page cache; those of a data set larger than the
memory come from the disk instead.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from lasad_jax.benchmarks.random_codes import write_random_codes
from lasad_jax.data.codes import CodeExamples
from lasad_jax.data.loader import train_batches

_IMAGES = flags.DEFINE_integer("images", 100_000, "Images.")
_AUGMENTATIONS = flags.DEFINE_integer("augmentations", 10, "Augmentations of each.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Codes of each.")
_PER_SHARD = flags.DEFINE_integer("images_per_shard", 640, "Images in a shard.")
_BATCH = flags.DEFINE_integer("batch", 256, "Batch size.")
_THREADS = flags.DEFINE_list("threads", ["1", "2"], "Threads that make batches.")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "Of each timing.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timings of each.")
_VOCAB = 16384


def samples_per_second(make_batch: Callable[[], object]) -> tuple[float, float]:
    """Best and median rate over the repeats."""
    rates = []
    for _ in range(_REPEATS.value):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _SECONDS.value:
            make_batch()
            count += _BATCH.value
        rates.append(count / elapsed)
    return max(rates), statistics.median(rates)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        write_random_codes(
            Path(folder),
            images=_IMAGES.value,
            augmentations=_AUGMENTATIONS.value,
            grid=(1, _TOKENS.value),
            vocab_size=_VOCAB,
            images_per_shard=_PER_SHARD.value,
            progress=True,
        )
        examples = CodeExamples(folder, "train")
        rows = lambda: rng.integers(0, len(examples), _BATCH.value)
        examples.batch(np.arange(len(examples)))  # opens every shard
        shards = len(examples.manifest.splits["train"].shards)
        print(f"{len(examples)} images x {examples.num_augmentations} in {shards} shards")
        print(f"{'samples/s':28} {'best':>9} {'median':>9}")

        def show(name: str, make_batch: Callable[[], object]) -> None:
            best, median = samples_per_second(make_batch)
            print(f"{name:28} {best:9.0f} {median:9.0f}", flush=True)

        reader = examples._reader(0)
        num_records = reader.num_records()
        places = lambda: rng.integers(0, num_records, _BATCH.value).tolist()
        show("array_record, one shard", lambda: [reader.read(i, i + 1) for i in places()])
        show("CodeExamples.batch", lambda: examples.batch(rows(), rows(), 0))
        for threads in map(int, _THREADS.value):
            batches = train_batches(examples, batch_size=_BATCH.value, seed=0, num_threads=threads)
            show(f"train_batches, {threads} thread(s)", lambda batches=batches: next(batches))


if __name__ == "__main__":
    app.run(main)

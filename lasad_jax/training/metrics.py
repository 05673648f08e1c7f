"""What a run tells the people who watch it: numbers, pictures, a progress bar."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from lasad_jax.files import whole_file


class Metrics:
    """metrics.jsonl and TensorBoard events of a run directory.

    A line of metrics.jsonl is one JSON object with "step" and any scalars. Lines after
    `start_step`, left by a run that was killed past its last checkpoint, are dropped.
    """

    def __init__(self, workdir: Path, start_step: int):
        self.path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= start_step]
        with whole_file(self.path) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        # It imports PyTorch where that is installed: a second for each command that needs neither.
        from tensorboardX import SummaryWriter

        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records numbers at `step`."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Shows a picture in TensorBoard."""
        self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # What fails in closing after another error has the same cause: that one is told.
        with contextlib.suppress(*([OSError] if kind else [])):
            self.close()

    def close(self) -> None:
        """Writes out everything."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def progress_bar(start: int, steps: int, *, visible: bool = True) -> tqdm:
    """Steps done, rate and time left; in a log file a line every half minute."""
    return tqdm(
        total=steps,
        initial=start,
        unit="step",
        dynamic_ncols=True,
        disable=not visible,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def plot_losses(metrics_path: Path, picture_path: Path, curves: dict[str, str], unit: str) -> None:
    """Draws metrics against steps.

    Args:
      metrics_path: a metrics.jsonl.
      picture_path: the PNG to write.
      curves: metric -> its legend.
      unit: of the metrics, the label of the y axis.
    """
    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, legend in curves.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            # Few points are measurements to see one by one, many are a line.
            axes.plot(
                *zip(*points, strict=True), label=legend, marker="o" if len(points) < 30 else ""
            )
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture_path, dpi=120)

"""Draws how far one token sees: python -m lasad_jax.decay_maps --out=FILE.png

Under each decay, by itself: each panel is the code grid, coloured by the weight D(t, s) that the
marked token gives to every token before it.

--workdir=RUN[,RUN...] draws trained runs instead, a column for each: above, what the prediction of
the marked token depends on (`receptive_field`, over held-out images); below, the half-lives that
the decays of its layers and heads have learned.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lasad_jax import ops
from lasad_jax.command import run
from lasad_jax.data.tokens import load_tokens
from lasad_jax.evaluation.reach import half_lives, receptive_field
from lasad_jax.files import whole_file
from lasad_jax.sampling.run import GeneratorRun

_OUT = flags.DEFINE_string("out", "decay_maps.png", "Path of the picture.")
_WORKDIR = flags.DEFINE_list("workdir", [], "Runs to draw, in place of the decays by themselves.")
_NUM = flags.DEFINE_integer("num", 64, "Held-out images of a receptive field.", 1)
_GRID, _QUERY = (16, 16), (10, 7)
_SMALLEST = 1e-5  # share of a receptive field that still has a colour
_UNITS = {"row_rate": "rows", "column_rate": "tokens of a row", "rate": "tokens"}


def decay_maps() -> dict[str, Float[np.ndarray, "R C"]]:
    """For each decay the weights that token `_QUERY` gives, NaN after it."""
    rate = lambda half_life: jnp.array([jnp.log(2.0) / half_life])
    families = {
        "none": ops.NoDecay(),
        "sequence": ops.SequenceDecay(rate(24)),
        "raster": ops.RasterDecay(row_rate=rate(3), column_rate=rate(48)),
        "manhattan": ops.ManhattanDecay(row_rate=rate(3), column_rate=rate(3)),
    }
    t = _QUERY[0] * _GRID[1] + _QUERY[1]
    maps = {}
    for name, decay in families.items():
        weights = np.array(ops.decay_matrix(decay, grid=_GRID, num_prefix=0)[0, t])
        weights[t + 1 :] = np.nan
        maps[name] = weights.reshape(_GRID)
    return maps


def draw_decays() -> Figure:
    """A panel for each decay."""
    maps = decay_maps()
    figure = _figure(11, 3.2)
    panels = figure.subplots(1, len(maps))
    for axes, (name, weights) in zip(panels, maps.items(), strict=True):
        image = _draw_grid(axes, weights, _QUERY, vmin=0, vmax=1)
        axes.set(title=name)
    figure.colorbar(image, ax=panels, label="weight D(t, s)", shrink=0.85)
    return figure


def draw_runs(workdirs: list[Path], num: int) -> Figure:
    """A column for each run: its receptive field, and its half-lives if it has any.

    Args:
      workdirs: of generators' runs.
      num: of held-out images.
    """
    figure = _figure(1 + 3.6 * len(workdirs), 7)
    panels = figure.subplots(2, len(workdirs), squeeze=False)
    for axes in panels[1, 1:]:
        axes.sharey(panels[1, 0])
    for workdir, (above, below) in zip(workdirs, panels.T, strict=True):
        generator = GeneratorRun.open(workdir)
        model, params = generator.config.model, jax.device_get(generator.params)
        held_out = load_tokens(generator.config.data).held_out
        # Spread evenly, since classes may come in order.
        rows = np.linspace(0, len(held_out) - 1, min(num, len(held_out)), dtype=np.int64)
        images = held_out.batch(rows)
        centre = (model.grid[0] // 2, model.grid[1] // 2)
        field = receptive_field(model, params, images["tokens"], images["labels"], centre)
        field = np.where(field > 0, np.maximum(field, _SMALLEST), np.nan)
        image = _draw_grid(above, field, centre, norm=LogNorm(_SMALLEST, 1))
        above.set(title=workdir.name)
        _draw_half_lives(below, half_lives(model, params))
    figure.colorbar(image, ax=panels[0], label="share of the gradient", shrink=0.85)
    return figure


def _draw_grid(axes: Axes, values: Float[np.ndarray, "R C"], place: tuple[int, int], **colours):
    axes.set_facecolor("0.92")
    image = axes.imshow(values, cmap="viridis", **colours)
    axes.plot(place[1], place[0], "s", color="tab:red", markersize=5)
    axes.set(xticks=[], yticks=[])
    return image


def _draw_half_lives(axes: Axes, found: dict[str, Float[np.ndarray, "layers H"]]) -> None:
    if not found:
        axes.set_axis_off()
        return
    for i, (name, values) in enumerate(found.items()):
        layers = np.arange(1, len(values) + 1) + 0.16 * (i - (len(found) - 1) / 2)
        axes.plot(layers, values, "o", color=f"C{i}", alpha=0.7, markersize=5)
        axes.plot([], [], "o", color=f"C{i}", label=_UNITS[name])
    axes.set(xlabel="layer", ylabel="half-life of a head", yscale="log")
    axes.set_xticks(range(1, len(values) + 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def main() -> None:
    """Draws the picture that the flags ask for."""
    workdirs = [Path(name) for name in _WORKDIR.value]
    figure = draw_runs(workdirs, _NUM.value) if workdirs else draw_decays()
    with whole_file(_OUT.value) as file:
        figure.savefig(file, format="png", dpi=110)
    print(_OUT.value)


if __name__ == "__main__":
    run(main)

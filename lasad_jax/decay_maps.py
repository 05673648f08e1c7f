"""Draws how far one token sees under each decay: python -m lasad_jax.decay_maps --out=FILE.png

Each panel is the code grid, coloured by the weight D(t, s) that the marked token gives to
every token before it.
"""

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lasad_jax import ops

_OUT = flags.DEFINE_string("out", "decay_maps.png", "Path of the picture.")
_GRID, _QUERY = (16, 16), (10, 7)


def decay_maps() -> dict[str, np.ndarray]:
    """For each decay the (R, C) weights that token `_QUERY` gives, NaN after it."""
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


def main(argv: list[str]) -> None:
    """Draws the picture."""
    del argv
    maps = decay_maps()
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(maps))
    for axes, (name, weights) in zip(panels, maps.items(), strict=True):
        axes.set_facecolor("0.92")
        image = axes.imshow(weights, vmin=0, vmax=1, cmap="viridis")
        axes.plot(_QUERY[1], _QUERY[0], "s", color="tab:red", markersize=5)
        axes.set(title=name, xticks=[], yticks=[])
    figure.colorbar(image, ax=panels, label="weight D(t, s)", shrink=0.85)
    figure.savefig(_OUT.value, dpi=110)
    print(_OUT.value)


if __name__ == "__main__":
    app.run(main)

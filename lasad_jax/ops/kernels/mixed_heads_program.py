"""What the warpgroups of `mixed_heads_mosaic_backward` share: its memory, signals, products."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lasad_jax.ops.kernels import mixed_heads_decays as md
from lasad_jax.ops.kernels import mixed_heads_tiles as mh
from lasad_jax.ops.kernels import mosaic_tiles as mg
from lasad_jax.ops.kernels.mosaic_columns import store

HEADS = 2  # of a program
STAGES = 2
GROUPS = 2  # of chunks whose decays are held at once
# Tiles that come together, by the barriers' name.
COPIES = {"gated": 3, "values": 1, "keys": 2}
# What one warpgroup of a head tells the other, once for each chunk: d_o is there, it has read
# queries, keys and d_state; queries, keys and d_state are there, it has read d_o and values. Once
# for each head: all gradients of values have left, the sums of one head have been taken.
SIGNALS = ("gave_d_o", "read_keys", "gave_keys", "read_d_o", "left", "summed")


@dataclasses.dataclass(frozen=True)
class Program:
    """What a warpgroup sees of the kernel: its own head's.

    Attributes:
      inputs, outputs, scratch, arrivals: by name, the last two of all heads of the program.
      own: which of these this one is.
      image, head: which it is of the inputs.
      is_last: whether no head comes after it.
      q_scale, epsilon, interpret: `backward`'s.
    """

    inputs: dict
    outputs: dict
    scratch: dict
    arrivals: dict
    own: jax.Array
    image: jax.Array
    head: jax.Array
    is_last: jax.Array
    q_scale: float
    epsilon: float
    interpret: bool

    def __getitem__(self, name):
        """This head's part of scratch memory, or its barriers."""
        return self.scratch[name].at[self.own]

    @property
    def chunks(self):
        return pl.cdiv(self.inputs["y"].shape[1], mg.CHUNK)

    @property
    def scale(self):
        """Of queries, its logarithm to base 2."""
        return math.log2(self.q_scale)

    @property
    def place(self):
        return self.image, self.head

    def load(self, tile):
        """In float32."""
        return mh.load(tile, self.interpret)

    def multiply(self, *sums, work=lambda: None):
        return mg.multiply(*sums, work=work, interpret=self.interpret)

    def turns(self, c):
        rows = pl.ds(c * mg.CHUNK, mg.CHUNK)
        return mh.Turns.load(self.inputs.get("table"), rows, self.interpret)

    def group(self, c):
        """Where the logarithms of the decays of a chunk's group are held."""
        return self["b"].at[lax.rem(lax.div(c, md.CHUNKS), GROUPS)]

    def decays(self, c):
        return mg.Decays.load(self.group(c).at[lax.rem(c, md.CHUNKS)], base=2)

    def weights(self, decays, keys):
        """Of pairs by (key, query): queries are not scaled, but what they meet."""
        return jnp.exp2(mg.by_column(decays.column + self.scale) - mg.by_row(keys))

    def fetch(self, name, source, c, column, tile, stage=0):
        """Begins to load a chunk's rows; `arrivals[name]` tells when they are there."""
        row, stages = c * mg.CHUNK, 1 if name == "gated" else STAGES
        stage = self.own * stages + stage
        source = self.inputs[source]
        self.arrivals[name].fetch(source, self.image, row, self.head, column, tile, stage)

    def leave(self, tile, c, column):
        """Begins to write a chunk's rows of d_y."""
        row, out = c * mg.CHUNK, self.outputs["d_y"]
        store(tile, out, self.image, row, self.head, column, self.interpret)

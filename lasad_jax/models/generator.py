"""LASADGen: class label and codes in, logits of the next code out."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.exchange import exchanged
from lasad_jax.models.folding import map_folded
from lasad_jax.models.layers import AddNorm, Embedding, FeedForward, Kernel
from lasad_jax.models.local_conv import LocalConv, init_recent
from lasad_jax.models.mixers import INIT_CACHES, MIXERS, SoftmaxCache
from lasad_jax.ops import State
from lasad_jax.ops.keep import keep, keep_policy, lean_policy
from lasad_jax.ops.kernels.choice import device
from lasad_jax.ops.product import product

_REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "lean": lean_policy,
    "cheap": keep_policy,
}


@struct.dataclass
class Cache:
    """What a layer remembers of the tokens so far.

    Attributes:
      mixer: of its mixer.
      recent: newest inputs of its local convolution, if it has one (`init_recent`).
    """

    mixer: State | SoftmaxCache
    recent: Float[Array, "*layers B W D"] | None


Stream = tuple[Float[Array, "B N D"], Float[Array, "B N D"]]


class Block(nn.Module):
    """A mixer and a feed-forward, which sees a token's neighbourhood as well, on the residual
    stream; a scan body over the layers.

    The carry is the stream and the branch that is still to be added to it: sum, dropout and
    norm are one pass at the beginning of the next branch. The kernels hold the norms' scales
    (`fold_norms`).
    """

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, carry: Stream, cache: Cache | None) -> tuple[Stream, Cache | None]:
        config = self.config
        mixer = MIXERS[config.mixer](config, name="mixer")
        conv = LocalConv(config, name="conv") if config.has_local_conv else None
        ffn = FeedForward(config, name="ffn")
        state, recent, index = None, None, 0
        if cache is not None:
            state, recent, index = cache.mixer, cache.recent, cache.mixer.index
        kernels = mixer.kernels(carry[0], state) | ffn.kernels(carry[0])
        kernels |= conv.kernels() if conv else {}
        x, branch, kernels = exchanged(*carry, kernels)
        x, y = AddNorm(config, self.train, name="mixer_norm")(x, branch)
        branch, state = mixer(y, kernels, state)
        x, y = AddNorm(config, self.train, name="ffn_norm")(x, _constrain(branch))
        if conv:
            y, recent = conv(y, recent, index, kernels["taps"])
            y = keep(y, if_room=True)
        branch = ffn(y, kernels)
        return (x, _constrain(branch)), None if cache is None else Cache(state, recent)


def _constrain(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    return nn.with_logical_constraint(x, ("batch", "tokens", "activation"))


class LASADGen(nn.Module):
    """The generator, scanned over layers.

    The sequence is one class-embedding prefix token, then the codes in raster order; the
    output at each place gives the logits of the code that comes next.

    Attributes:
      config: the architecture.
      train: dropout and class dropout are on (they draw from the "dropout" key).
      folded: the parameters are not those of training but `folding.fold` of them.
    """

    config: ModelConfig
    train: bool = False
    folded: bool = False

    def setup(self):
        config = self.config
        self.token_embedding = Embedding(config, config.vocab_size, ("vocab", "embed"))
        self.class_embedding = Embedding(config, config.num_classes + 1, ("classes", "embed"))
        block = Block
        unroll = min(config.unroll or _default_unroll(config), config.num_layers)
        if config.remat != "none":
            # Within a loop nothing could be mistaken for a common subexpression.
            policy = _REMAT_POLICIES[config.remat]
            block = nn.remat(Block, prevent_cse=unroll > 1, policy=policy)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=config.num_layers,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if not self.folded:
            blocks = map_folded(blocks, config, self.is_initializing())
        self.blocks = blocks(config, self.train)
        self.final_norm = AddNorm(config, self.train)
        shape, zeros = (config.width, config.vocab_size), nn.initializers.zeros
        self.head = Kernel(config, shape, ("embed", "vocab"), zeros)

    def __call__(
        self, tokens: Int[Array, "B N"], labels: Int[Array, " B"]
    ) -> Float[Array, "B N V"]:
        """Logits of every code given the label and the codes before it (teacher forcing).

        Args:
          tokens: an image's codes in raster order, or its first N; the last is only
            predicted, never read.
          labels: 0 to num_classes - 1, or num_classes for "no class".

        Returns:
          float32 logits; row i predicts tokens[:, i].
        """
        return self._logits(self.before_head(tokens, labels))

    def before_head(
        self, tokens: Int[Array, "B N"], labels: Int[Array, " B"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "D V"]]:
        """The two factors of the logits, for losses that never hold all logits at once."""
        if self.train and self.config.class_dropout:
            dropped = jax.random.bernoulli(
                self.make_rng("dropout"), self.config.class_dropout, labels.shape
            )
            labels = jnp.where(dropped, self.config.num_classes, labels)
        factors, _ = self._run(self._embed(labels, tokens[:, :-1]), None)
        return factors

    def prefill(
        self, labels: Int[Array, " B"], tokens: Int[Array, "B n"]
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads the label and the first n codes (n may be 0) in one parallel pass.

        Returns:
          logits of code number n, and the cache to go on from.
        """
        (x, kernel), cache = self.read(labels, tokens)
        return self._logits((x[:, None], kernel))[:, 0], cache

    def read(
        self, labels: Int[Array, " B"], tokens: Int[Array, "B n"]
    ) -> tuple[tuple[Float[Array, "B D"], Float[Array, "D V"]], Cache]:
        """`prefill` up to the head: the two factors of the logits, and the cache."""
        cache = init_cache(self.config, labels.shape[0])
        (x, kernel), cache = self._run(self._embed(labels, tokens), cache)
        return (x[:, -1], kernel), cache

    def decode_step(
        self, tokens: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads one code; returns the logits of the next and the new cache."""
        factors, cache = self._run(self.token_embedding(tokens)[:, None], cache)
        return self._logits(factors)[:, 0], cache

    def _embed(self, labels, tokens) -> Float[Array, "B N D"]:
        # Each by itself: where width and images are split over the same devices, a part of the
        # table is to be sent, not one-hot vectors of the whole batch.
        prefix = _constrain(self.class_embedding(labels)[:, None])
        return jnp.concatenate([prefix, _constrain(self.token_embedding(tokens))], axis=1)

    def _run(self, x, cache):
        # The embedding is the first branch: its dropout is that of all branches.
        x = _constrain(x)
        (x, branch), cache = self.blocks((jnp.zeros_like(x), x), cache)
        head = self.head(self.final_norm.scale), self.head.axes
        x, branch, kernels = exchanged(x, branch, {"head": head})
        _, y = self.final_norm(x, branch)
        return (y, kernels["head"]), cache

    def _logits(self, factors) -> Float[Array, "B N V"]:
        x, kernel = factors
        logits = product(x, kernel).astype(jnp.float32)
        return nn.with_logical_constraint(logits, ("batch", "tokens", "vocab"))


def _default_unroll(config: ModelConfig) -> int:
    return config.num_layers if device().is_gpu else 1


def init_cache(config: ModelConfig, batch: int) -> Cache:
    """The caches of all layers before any token, stacked along the first axis."""
    one = Cache(INIT_CACHES[config.mixer](config, batch), init_recent(config, batch))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), one)


def init_parameters(config: ModelConfig, key: jax.Array) -> PyTree:
    """Fresh parameters, each boxed with the logical names of its axes."""
    # Neither batch nor length shapes a parameter, so the smallest will do.
    tokens, labels = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32)
    # In a loop: unrolled, every layer's random numbers would be compiled anew, for minutes.
    model = LASADGen(dataclasses.replace(config, unroll=1))
    return model.init(key, tokens, labels)["params"]


def abstract_parameters(config: ModelConfig) -> PyTree:
    """Shapes and dtypes of the parameters, boxed with their axes' names."""
    return jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, without allocating them."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(config)))

"""How many FLOPs a training step has, and how many bytes a token of sampling must read."""

import math

import jax

from lasad_jax.models.config import ModelConfig
from lasad_jax.models.generator import abstract_parameters


def _sizes(config: ModelConfig) -> dict[str, int]:
    # Parameters in their boxes: the last part of a path is the box's "value".
    leaves = jax.tree_util.tree_leaves_with_path(abstract_parameters(config))
    key = lambda path: jax.tree_util.keystr(path[:-1], simple=True, separator="/")
    return {key(path): leaf.size for path, leaf in leaves}


def product_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all matrices of the blocks, and the head.

    Not the embeddings, which are looked up, nor what works element by element (norms, rates,
    biases, the convolution's taps).
    """
    return sum(
        size
        for name, size in _sizes(config).items()
        if name.endswith("/kernel") and "/conv/" not in name
    )


def product_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the products with parameters in a training step over so many tokens.

    Six for each parameter and token, as PaLM counts (arXiv 2204.02311, appendix B): a
    multiplication and an addition, once forward and twice backward. What the backward pass
    computes again does not count.
    """
    return 6 * product_parameters(config) * tokens


def attention_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the mixers' own products in a training step, by their plainest formula.

    Softmax: q k^T and its product with v over the whole sequence, as PaLM counts them, though
    a causal kernel leaves out half. LASAD: k v^T and q S for one state, whatever chunks cost
    beyond that (and "manhattan", which has no such form, the same).
    """
    per_head = config.query_dim + config.value_dim
    reach = (
        config.num_tokens * per_head
        if config.mixer == "softmax"
        else 2 * config.query_dim * config.value_dim
    )
    return 6 * config.num_layers * config.num_heads * reach * tokens


def step_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of a training step over so many tokens: both of the above."""
    return product_flops(config, tokens) + attention_flops(config, tokens)


def read_per_token(config: ModelConfig, rows: int) -> dict[str, int]:
    """Bytes that drawing one token of each row has to read, in two bytes a number.

    Args:
      config: the generator.
      rows: images drawn at once, twice as many with guidance.

    Returns:
      "parameters": all but the embeddings, of which a row reads one vector. "state": LASAD's
      memory, read once; for softmax the keys and values, as many as there are on average over
      an image. What is written is not counted: a memory may be written seldom, keys and
      values are few.
    """
    sizes = _sizes(config)
    embeddings = sum(size for name, size in sizes.items() if name.endswith("embedding"))
    parameters = sum(sizes.values()) - embeddings + rows * config.width
    heads = config.num_layers * rows * config.num_heads
    if config.mixer == "softmax":
        # The step that reads grid token t sees the class, tokens 0 to t: t + 2 of them. It is
        # taken for t = 0 to N - 2, since the class alone gives the first token.
        seen = config.num_tokens / 2 + 1
        state = math.ceil(heads * seen * (config.query_dim + config.value_dim))
    else:
        columns = config.grid[1] if config.decay == "manhattan" else 1
        state = heads * columns * config.query_dim * config.value_dim
    return {"parameters": 2 * parameters, "state": 2 * state}

"""Times every form of the operator against softmax attention on the device at hand.

    python -m lasad_jax.benchmarks.operator [--decays=raster,manhattan] [--grids=8,16,28,64]

Prints milliseconds of forward plus backward (median) and the ratio to
`jax.nn.dot_product_attention`, causal, on the same inputs (cuDNN's flash attention on a
GPU in bf16). `implementation="auto"` follows these tables.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from lasad_jax import ops

_DECAYS = flags.DEFINE_list("decays", ["raster", "selective", "manhattan"], "Decays to time.")
_GRIDS = flags.DEFINE_list("grids", ["8", "16", "24", "28", "32", "64"], "Sides of square grids.")
_TOKENS = flags.DEFINE_integer("tokens", 16384, "Tokens in all; the batch follows from it.")
_HEADS = flags.DEFINE_integer("heads", 12, "Heads.")
_DIM = flags.DEFINE_integer("dim", 64, "Dk and Dv.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs.")


def median_milliseconds(function, *args, repeats: int) -> float:
    """Median wall time of one call, compiled and warmed up before."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _forward_and_backward(attention):
    def loss(q, k, v, cotangent):
        return jnp.sum(attention(q, k, v).astype(jnp.float32) * cotangent)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    gpu = jax.default_backend() == "gpu"
    rate = jnp.geomspace(0.005, 0.7, _HEADS.value)
    families = {
        "none": ops.NoDecay(),
        "sequence": ops.SequenceDecay(rate),
        "raster": ops.RasterDecay(rate, rate),
        "selective": ops.RasterDecay(rate, rate),
        "manhattan": ops.ManhattanDecay(rate, rate),
    }
    print(f"{jax.devices()[0].device_kind}, {_HEADS.value} heads of {_DIM.value}, bf16")
    print(
        f"{'decay':10} {'tokens':>6} {'batch':>5} {'softmax':>8}  "
        + "".join(f"{form:>18}" for form in ops.IMPLEMENTATIONS)
    )
    for side in map(int, _GRIDS.value):
        num_tokens = side * side
        batch = max(1, _TOKENS.value // num_tokens)
        keys = jax.random.split(jax.random.key(side), 5)
        shape = (batch, num_tokens, _HEADS.value, _DIM.value)
        q, k, v, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
        gate = -jax.nn.softplus(jax.random.normal(keys[4], shape[:3]) - 4)
        softmax = _forward_and_backward(
            lambda q, k, v: jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation="cudnn" if gpu else None
            )
        )
        peer = median_milliseconds(softmax, q, k, v, cotangent, repeats=_REPEATS.value)
        for name in _DECAYS.value:
            row = f"{name:10} {num_tokens:6} {batch:5} {peer:8.3f}  "
            for form in ops.IMPLEMENTATIONS:
                if form == "quadratic" and num_tokens > 1024:
                    row += f"{'-':>18}"
                    continue
                ours = _forward_and_backward(
                    lambda q, k, v, name=name, form=form, side=side, gate=gate: (
                        ops.linear_attention(
                            q,
                            k,
                            v,
                            families[name],
                            grid=(side, side),
                            num_prefix=0,
                            log_gate=gate if name == "selective" else None,
                            implementation=form,
                        )
                    )
                )
                took = median_milliseconds(ours, q, k, v, cotangent, repeats=_REPEATS.value)
                row += f"{took:10.3f} ({took / peer:4.2f}x)"
            print(row, flush=True)


if __name__ == "__main__":
    app.run(main)

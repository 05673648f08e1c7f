"""Which form of decoding runs where, and which weights it takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from kernel_cases import on
from test_decode_product import NEEDS_JAX_11

from lasad_jax.config import SamplingConfig
from lasad_jax.models import SIZES, ModelConfig, decoder, decoder_forms, decoder_products
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.ops.kernels.between_tiling import UNIT
from lasad_jax.ops.kernels.decode_tiling import PAIR
from lasad_jax.sampling.decode import _generate_everywhere

SMALL = {"num_layers": 1, "width": 256, "num_heads": 4, "ffn_width": 512, "dtype": "bfloat16"}


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def parameters(config):
    """Their shapes."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(shape, nn.unbox(abstract_parameters(config)))


def traced(config, rows, prepared_for="auto", implementation="auto"):
    """The jaxpr of reading labels and a step, with weights prepared in the same program."""
    params = parameters(config)

    def run(params, labels, tokens):
        weights = decoder.prepare(config, params, prepared_for)
        _, cache = decoder.prefill(config, weights, labels, tokens)
        return decoder.decode(config, weights, labels, cache, implementation=implementation)

    return str(jax.make_jaxpr(run)(params, integers(rows), integers(rows, 0)))


@NEEDS_JAX_11
def test_auto_takes_it_where_it_can_run(monkeypatch, tmp_path):
    config = ModelConfig(**SMALL)
    together = lambda *args: "decode_between" in traced(config, *args)
    with on("H200"):
        for rows in (1, 2, 56, 64, 67, 512):
            assert together(rows)
        assert not together(520)
        for rows in (1, 2, 56):
            assert "decode_between" in traced(config, rows, "mosaic", "mosaic")
        assert not together(64, "triton")
        for changes in ({"local_conv": "off"}, {"dtype": "float32"}, {"ffn_width": 520}):
            assert "decode_between" not in traced(dataclasses.replace(config, **changes), 64)
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
        assert together(64)
        (tmp_path / "control").touch()
        assert not together(64)
        assert not together(64, "mosaic")
        with pytest.raises(ValueError, match="which MPS shares with others; use 'triton'"):
            traced(config, 64, "mosaic", "mosaic")
    with on("A100"):
        assert not together(64)
        assert not together(64, "mosaic")


@NEEDS_JAX_11
def test_a_kernel_of_one_product_leaves_its_weights_to_xla():
    """It would take gates for ups: columns of both by turns are its own, half as many at a time."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (128, 512)))
    with on("H200"):
        for pair in (PAIR, UNIT):
            swiglu = functools.partial(decoder_products.swiglu, True, norm=True, pair=pair)
            assert ("decode_product" in str(jax.make_jaxpr(swiglu)(x, w))) == (pair == PAIR)


@NEEDS_JAX_11
@pytest.mark.parametrize(
    ("images", "together"), [(2, True), (32, True), (128, True), (512, True), (514, False)]
)
def test_each_device_launches_it_for_its_own_rows(images, together):
    """Which are, with guidance, as many as images on two devices."""
    config = ModelConfig(**SMALL)
    with on("H200"):
        device = jax.sharding.get_abstract_mesh().abstract_device
        weights = jax.eval_shape(functools.partial(decoder.prepare, config), parameters(config))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=device)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    arrays = key, integers(images), integers(images), integers(images, 0)
    draw = functools.partial(_generate_everywhere, config, SamplingConfig(guidance=2.0), mesh)
    text = str(jax.make_jaxpr(draw)(weights, *arrays))
    assert ("decode_between" in text) == together


@pytest.mark.parametrize("size", ["B", "L", "XL"])
@pytest.mark.parametrize("selective", [False, True])
def test_the_projection_is_as_wide_as_said(size, selective):
    sizes = SIZES[size] | {"num_layers": 1, "selective": selective}
    config = ModelConfig(**sizes, dtype="bfloat16")
    params = parameters(config)
    weights = jax.eval_shape(functools.partial(decoder.prepare, config), params)
    assert weights.layers[0].projection.shape[1] == decoder_forms.projection_columns(config)


@NEEDS_JAX_11
def test_what_it_cannot_take_is_refused():
    config = ModelConfig(**SMALL)

    def decode(rows, prepared_for="mosaic", **changes):
        with on("H200"):
            model = dataclasses.replace(config, **changes)
            traced(model, rows, prepared_for, "mosaic")

    decode(64)
    with pytest.raises(ValueError, match="at most 512 rows, not 520"):
        decode(520)
    with pytest.raises(ValueError, match="'mosaic' takes weights that were prepared for it"):
        decode(64, "triton")
    with pytest.raises(ValueError, match="bfloat16 and a local convolution, not bfloat16, 'off'"):
        decode(64, local_conv="off")
    with pytest.raises(ValueError, match=r"multiples of 64, at least 128, not 256 and .*520"):
        decode(64, ffn_width=520)

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
from lasad_jax.models import SIZES, ModelConfig, decoder, decoder_forms
from lasad_jax.models.generator import abstract_parameters
from lasad_jax.sampling.decode import _generate_everywhere, _rows_of_device

SMALL = {"num_layers": 1, "width": 256, "num_heads": 4, "ffn_width": 512, "dtype": "bfloat16"}


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def parameters(config):
    """Their shapes."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(shape, nn.unbox(abstract_parameters(config)))


def traced(config, rows, implementation="auto", prepared_for=None):
    """The jaxpr of reading labels and a step, with weights prepared in the same program."""
    params = parameters(config)

    def run(params, labels, tokens):
        weights = decoder.prepare(config, params, prepared_for or rows, implementation)
        _, cache = decoder.prefill(config, weights, labels, tokens)
        return decoder.decode(config, weights, labels, cache)

    return str(jax.make_jaxpr(run)(params, integers(rows), integers(rows, 0)))


@NEEDS_JAX_11
def test_auto_takes_it_where_it_can_run(monkeypatch, tmp_path):
    config = ModelConfig(**SMALL)
    together = lambda *args: "decode_layers" in traced(config, *args)
    with on("H200"):
        for rows in (64, 67, 512):
            assert together(rows)
        for rows in (2, 56, 520):
            assert not together(rows)
        for rows in (1, 2, 56):
            assert together(rows, "mosaic")
        assert not together(64, "triton")
        for changes in (
            {"local_conv": "off"},
            {"dtype": "float32"},
            {"ffn_width": 520},
            {"key_dim": 64},
        ):
            assert "decode_layers" not in traced(dataclasses.replace(config, **changes), 64)
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
        assert together(64)
        (tmp_path / "control").touch()
        assert not together(64)
        with pytest.raises(ValueError, match="which MPS shares with others; use 'triton'"):
            traced(config, 64, "mosaic")
    with on("A100"):
        assert not together(64)


@NEEDS_JAX_11
@pytest.mark.parametrize(("images", "together"), [(32, False), (128, True), (512, True)])
def test_weights_are_for_the_rows_of_each_device(images, together):
    """Which are, with guidance, as many as images on two devices."""
    config = ModelConfig(**SMALL)
    auto = (jax.sharding.AxisType.Auto,)
    sampling = SamplingConfig(guidance=2.0)
    with on("H200"):
        device = jax.sharding.get_abstract_mesh().abstract_device
        mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=device)
        num_rows = _rows_of_device(mesh, images, sampling)
        prepare = functools.partial(decoder.prepare, config, num_rows=num_rows)
        weights = jax.eval_shape(prepare, parameters(config))
    assert num_rows == images
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    arrays = key, integers(images), integers(images), integers(images, 0)
    draw = functools.partial(_generate_everywhere, config, sampling, mesh)
    text = str(jax.make_jaxpr(draw)(weights, *arrays))
    assert ("decode_layers" in text) == together


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

    def decode(rows, prepared_for=None, **changes):
        with on("H200"):
            traced(dataclasses.replace(config, **changes), rows, "mosaic", prepared_for)

    decode(64)
    with pytest.raises(ValueError, match="at most 512 rows, not 520"):
        decode(520)
    with pytest.raises(ValueError, match="at most 512 rows, not 520"):
        decode(520, prepared_for=64)
    with pytest.raises(ValueError, match="bfloat16 and a local convolution, not bfloat16, 'off'"):
        decode(64, local_conv="off")
    with pytest.raises(ValueError, match=r"heads of \(32, 64\) keys and values, not \(64, 64\)"):
        decode(64, key_dim=64)
    with pytest.raises(ValueError, match=r"multiples of 64, at least 128, not 256 and .*520"):
        decode(64, ffn_width=520)

"""The linear forms lower for accelerators from a machine that has none."""

import jax
import pytest
from ops_cases import VARIANTS, make_args, with_gradients


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("form", ["chunked", "scan"])
@pytest.mark.parametrize(("family", "gated"), VARIANTS)
def test_forward_and_backward_lower(family, gated, form, platform):
    args = make_args(family, 257, gated=gated)
    traced = jax.jit(with_gradients(form, (16, 16), 1)).trace(args, args[2])
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()

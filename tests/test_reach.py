"""How far a generator sees, against PyTorch's gradients and by what a decay forbids."""

import jax
import numpy as np
import pytest
import torch
from exporting import make_export, write
from test_models import tiny_model

from lasad_jax.evaluation.reach import half_lives, receptive_field
from lasad_jax.interop.modeling_lasadgen import LASADGen


@pytest.mark.parametrize(
    ("decay", "names"),
    [
        ("raster", {"row_rate", "column_rate"}),
        ("manhattan", {"row_rate", "column_rate"}),
        ("sequence", {"rate"}),
        ("none", set()),
    ],
)
def test_half_lives_are_those_of_the_parameters(decay, names):
    config, variables, _, _ = tiny_model(decay=decay, selective=False)
    found = half_lives(config, variables["params"])
    assert found.keys() == names
    for name, values in found.items():
        rate = np.log1p(np.exp(np.float64(variables["params"]["blocks"]["mixer"][name])))
        assert values.shape == (config.num_layers, config.num_heads)
        np.testing.assert_allclose(np.exp(-rate * values), 0.5, rtol=1e-5)


def test_softmax_has_no_half_lives():
    config, variables, _, _ = tiny_model(mixer="softmax", key_dim=0)
    assert half_lives(config, variables["params"]) == {}


@pytest.mark.parametrize("changes", [{}, {"mixer": "softmax", "key_dim": 0}], ids=str)
def test_receptive_field_is_the_gradient_in_pytorch(tmp_path, changes):
    export = make_export(seed=3, grid=(3, 5), **changes)
    config, (row, column) = export.config.model, (1, 3)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, config.vocab_size, (18, config.num_tokens))
    labels = rng.integers(0, config.num_classes + 1, 18)
    found = receptive_field(config, export.params, tokens, labels, (row, column))

    model = LASADGen.from_pretrained(write(tmp_path / "exported", export))
    embedded = []
    model.token_embedding.register_forward_hook(lambda *call: embedded.append(call[2]))
    logits = model(torch.from_numpy(tokens), torch.from_numpy(labels))
    place = row * config.grid[1] + column
    chosen = logits[:, place].log_softmax(-1).gather(1, torch.from_numpy(tokens[:, [place]]))
    (gradient,) = torch.autograd.grad(chosen.sum(), embedded[0])
    expected = gradient.abs().mean((0, 2)).numpy()
    expected = np.pad(expected, (0, config.num_tokens - len(expected)))
    assert (expected[place:] == 0).all()
    np.testing.assert_allclose(found, (expected / expected.sum()).reshape(config.grid), atol=1e-5)
    assert (found.reshape(-1)[:place] > 1e-4).all()


def test_one_layer_of_rows_that_decay_at_once_sees_its_row():
    """The token that is read last and those of its row, although a gate and RoPE are there."""
    config, variables, tokens, labels = tiny_model(
        decay="raster", num_layers=1, local_conv="off", grid=(4, 5)
    )
    params = jax.tree.map(np.asarray, variables["params"])
    params["blocks"]["mixer"]["row_rate"] = np.full((1, config.num_heads), 60.0, np.float32)
    field = receptive_field(config, params, tokens, labels, (2, 4))
    assert (field[2, :4] > 1e-3).all()
    assert (np.delete(field, 2, axis=0) < 1e-9).all()
    # The first of a row reads the last of the row before.
    field = receptive_field(config, params, tokens, labels, (2, 0))
    assert (field[1] > 1e-3).all()
    assert (np.delete(field, 1, axis=0) < 1e-9).all()


@pytest.mark.parametrize("place", [(0, 0), (4, 0), (0, 5), (-1, 2)])
def test_places_without_earlier_tokens_are_refused(place):
    config, variables, tokens, labels = tiny_model()
    with pytest.raises(ValueError, match=r"place: .* must be on the grid \(4, 5\)"):
        receptive_field(config, variables["params"], tokens, labels, place)

"""Exports of tiny models whose every parameter is random."""

import jax
import numpy as np
import torch
from jaxtyping import PyTree
from test_models import tiny_model
from torch_tokenizer import SMALL

from lasad_jax.config import Config, SamplingConfig
from lasad_jax.interop import modeling_lasadgen
from lasad_jax.interop.export_folder import Export, write_export
from lasad_jax.models.tokenizer import abstract_tokenizer
from lasad_jax.models.tokenizer_config import TokenizerConfig

# Several threads would wait for each other longer than such small products take.
torch.set_num_threads(1)

GUIDED = SamplingConfig(guidance=1.5, guidance_schedule="linear", top_k=9, top_p=0.95)
# Every decay, gate, convolution, rotation and mixer; Dk unlike Dv; grids of one row, one column.
VARIANTS = [
    {"decay": "raster", "grid": (3, 5)},
    {"decay": "raster", "key_dim": 4, "grid": (1, 7), "selective": False},
    {"decay": "sequence", "key_dim": 12, "local_conv": "off", "grid": (3, 5)},
    {"decay": "sequence", "selective": False, "rope": False},
    {"decay": "none", "grid": (5, 1), "rope": False},
    {"decay": "none", "selective": False, "local_conv": "off", "key_dim": 4},
    {"decay": "manhattan", "selective": False, "key_dim": 4, "grid": (3, 5)},
    {"decay": "manhattan", "selective": False, "local_conv": "off", "rope": False, "grid": (1, 7)},
    {"mixer": "softmax", "grid": (3, 5)},
    {"mixer": "softmax", "rope": False, "grid": (5, 1), "local_conv": "on"},
]


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def make_export(seed=0, dtype="float32", sampling=GUIDED, tokenizer=None, **changes) -> Export:
    model, variables, _, _ = tiny_model(seed, **changes)
    return Export(
        config=Config(model=model, sampling=sampling),
        params=jax.device_get(variables["params"]),
        step=7,
        averaged=True,
        class_names=tuple(f"class {i}" for i in range(model.num_classes)),
        tokenizer=tokenizer,
        dtype=dtype,
    )


def random_tokenizer() -> tuple[TokenizerConfig, PyTree]:
    rng = np.random.default_rng(0)
    random = lambda x: rng.standard_normal(x.shape, np.float32)
    return SMALL, jax.tree.map(random, abstract_tokenizer(SMALL))


def write(folder, export: Export, shard_bytes: int = 10**9):
    folder.mkdir()
    write_export(folder, export, shard_bytes=shard_bytes)
    return folder


def torch_model(seed=0, **changes) -> modeling_lasadgen.LASADGen:
    """In torch alone; the changes are those of `tiny_model`."""
    fields = {
        "vocab_size": 11,
        "num_classes": 3,
        "grid": (4, 5),
        "num_layers": 2,
        "width": 16,
        "num_heads": 2,
        "key_dim": 8,
        "ffn_width": 24,
        "mixer": "lasad",
        "decay": "raster",
        "selective": True,
        "local_conv": changes.get("mixer") != "softmax",
        "rope": True,
    }
    if "local_conv" in changes:
        changes["local_conv"] = changes["local_conv"] == "on"
    model = modeling_lasadgen.LASADGen(modeling_lasadgen.ModelConfig(**fields | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_codes(model: modeling_lasadgen.LASADGen, seed=0, batch=3):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, model.config.vocab_size, (batch, model.config.num_tokens))
    labels = rng.integers(0, model.config.num_classes + 1, batch)
    return torch.from_numpy(codes), torch.from_numpy(labels)

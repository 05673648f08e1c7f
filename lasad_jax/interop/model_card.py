"""The README.md of an exported generator: what it is and how to run it."""

from lasad_jax.interop.export_folder import Export
from lasad_jax.interop.verification import Verification
from lasad_jax.models import ModelConfig, count_parameters

_CARD = """---
library_name: transformers
tags: [image-generation, class-conditional, autoregressive, linear-attention, lasad]
---

# {name}

LASADGen (arXiv [2507.01652](https://arxiv.org/abs/2507.01652)) draws an image of a class code
by code: a grid of {rows} x {columns} codes, each one of {vocab_size}. {mechanism}

| | |
| --- | --- |
| parameters | {parameters} ({num_layers} layers, width {width}, {num_heads} heads), {which} |
| mixer | {mixer} |
| classes | {classes} |
| stored | matrices in {dtype}, all else in float32 |
| verified | {verified} |

Trained and exported by `lasad_jax`, at step {step}.

## Draw

With torch and safetensors alone, in this folder:

```python
import torch
from modeling_lasadgen import LASADGen

model = LASADGen.from_pretrained(".")  # device="cuda", dtype=torch.bfloat16
labels = torch.tensor([{labels}])
codes = model.generate(labels, generator=torch.Generator().manual_seed(0))
```

Guidance, temperature, top-k and top-p are those of `generation_config.json`; any of them can be
given to `generate`, such as `guidance_scale=1.5`, `top_k=100`. With transformers:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True)
codes = model.generate(labels)
```

## From codes to images

{images}
"""
_LASAD = (
    "Its linear attention decays with the distance on that grid, and remembers a state whose size "
    "does not grow with the codes drawn."
)
_SOFTMAX = "It is the softmax baseline of LASAD, with a cache of keys and values."
_PIXELS = """The codes are grey values:

```python
images = (codes / {most} * 255).round().to(torch.uint8).reshape(-1, {rows}, {columns})
```"""
_TOKENIZER = """`tokenizer.safetensors` holds the image tokenizer under the names and shapes of
LlamaGen (arXiv [2406.06525](https://arxiv.org/abs/2406.06525)), whose own code decodes with it:

    vq_model.load_state_dict(safetensors.torch.load_file("tokenizer.safetensors"))
    images = vq_model.decode_code(codes, (len(codes), {codebook_dim}, {rows}, {columns}))"""


def model_card(name: str, export: Export, verification: Verification | None) -> str:
    """The card in Markdown.

    Args:
      name: its title.
      export: what was exported.
      verification: of it, if it took place.
    """
    model, names = export.config.model, export.class_names
    fields = {name: getattr(model, name) for name in ("vocab_size", "num_layers", "width")}
    fields |= {"rows": model.grid[0], "columns": model.grid[1], "num_heads": model.num_heads}
    if export.tokenizer is None:
        images = _PIXELS.format(most=model.vocab_size - 1, **fields)
    else:
        images = _TOKENIZER.format(codebook_dim=export.tokenizer[0].codebook_dim, **fields)
    return _CARD.format(
        **fields,
        name=name,
        mechanism=_LASAD if model.mixer == "lasad" else _SOFTMAX,
        parameters=f"{count_parameters(model):,}",
        which="the running average" if export.averaged else "no average",
        mixer=_mixer(model),
        classes=model.num_classes
        if names is None
        else f"{model.num_classes}, named in config.json",
        dtype=export.dtype,
        verified=describe(verification),
        step=export.step,
        labels=", ".join(str(label) for label in range(min(3, model.num_classes))),
        images=images,
    )


def describe(verification: Verification | None) -> str:
    """What was found, in a line."""
    if verification is None:
        return "no"
    return (
        f"float32 logits of PyTorch and JAX differ by at most {verification.difference:.1g}; "
        f"{verification.codes} codes drawn alike"
    )


def _mixer(model: ModelConfig) -> str:
    parts = ["softmax attention"]
    if model.mixer == "lasad":
        parts = [f"LASAD with decay `{model.decay}`"]
        parts += ["content gate"] * model.selective
    parts += ["2D RoPE"] * model.rope + ["local convolution"] * model.has_local_conv
    return ", ".join(parts)

"""LlamaGen's sizes, smaller ones for small data, and equal parameters for every mixer."""

from lasad_jax.models.config import ModelConfig

# arXiv 2406.06525, table 1; "tiny", "small" and "medium" are ours.
SIZES = {
    "tiny": {"num_layers": 4, "width": 128, "num_heads": 4},
    "small": {"num_layers": 6, "width": 256, "num_heads": 4},
    "medium": {"num_layers": 10, "width": 384, "num_heads": 6},
    "B": {"num_layers": 12, "width": 768, "num_heads": 12},
    "L": {"num_layers": 24, "width": 1024, "num_heads": 16},
    "XL": {"num_layers": 36, "width": 1280, "num_heads": 20},
    "XXL": {"num_layers": 48, "width": 1536, "num_heads": 24},
    "3B": {"num_layers": 24, "width": 3200, "num_heads": 32},
}


def ffn_width(config: ModelConfig) -> int:
    """Hidden width of the SwiGLU feed-forward.

    For softmax LlamaGen's: 8/3 of the width, rounded up to a multiple of 256. LASAD's
    mixer has an output gate more (and Dk may differ): that many parameters are taken
    from the feed-forward, so that comparisons are at equal size.
    """
    if config.ffn_width:
        return config.ffn_width
    llamagen = -(-int(2 / 3 * 4 * config.width) // 256) * 256
    if config.mixer == "softmax":
        return llamagen
    extra_columns = 2 * config.num_heads * config.query_dim - config.width
    exact = llamagen - extra_columns / 3
    # Tensor cores and TPU lanes want round sizes; small models cannot afford coarse ones.
    multiple = 64 if exact >= 1024 else 16
    return max(multiple, round(exact / multiple) * multiple)

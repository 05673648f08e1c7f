"""LlamaGen's tokenizer in PyTorch, written apart from the one under test, as its reference.

Module names are those of LlamaGen's files; images are (B, channels, h, w).
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lasad_jax.interop.tokenizer_files import load_tokenizer
from lasad_jax.models.tokenizer_config import TokenizerConfig

SMALL = TokenizerConfig(
    channels=3,
    width=32,
    multipliers=(1, 2),
    encoder_blocks=1,
    decoder_blocks=2,
    latent_channels=12,
    codebook_size=60,
    codebook_dim=5,
)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Down(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, and the way to the next."""

    def __init__(self, before: int, after: int, blocks: int, attend: bool, resample: dict):
        super().__init__()
        self.res = nn.ModuleList(Residual(after if i else before, after) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(after) for _ in range(blocks * attend))
        for name, layer in resample.items():
            self.add_module(name, layer)
        self.resample = list(resample)

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in self.resample:
            x = getattr(self, name)(x)
        return x


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [Residual(channels, channels), Attention(channels), Residual(channels, channels)]
    )


class Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[i - 1] if i else config.width,
                width,
                config.encoder_blocks,
                i == last,
                {} if i == last else {"downsample": Down(width)},
            )
            for i, width in enumerate(widths)
        )
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.decoder_blocks,
                i == 0,
                {} if i == last else {"upsample": Up(width)},
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, z):
        """Channels last; normalised z, the codes' normalised vectors, codes."""
        z = F.normalize(z, dim=-1)
        codebook = F.normalize(self.embedding.weight, dim=-1)
        codes = torch.cdist(z.flatten(0, -2), codebook).argmin(-1).reshape(z.shape[:-1])
        return z, codebook[codes], codes


class Tokenizer(nn.Module):
    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def encode(self, images):
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def decode(self, vectors):
        return self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))

    def forward(self, images):
        z, quantized, codes = self.quantize(self.encode(images))
        images = self.decode(z + (quantized - z).detach())
        return images, z, quantized, codes


def random_tokenizer(config: TokenizerConfig, seed: int) -> Tokenizer:
    """Random weights of every kind, the norms' too."""
    torch.manual_seed(seed)
    model = Tokenizer(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model


def pair(config: TokenizerConfig, folder, seed: int = 0):
    """The same random weights for both: the reference, and parameters read from its file."""
    reference = random_tokenizer(config, seed)
    torch.save(reference.state_dict(), folder / "x.pt")
    loaded, params = load_tokenizer(folder / "x.pt")
    assert loaded == config
    return reference, {"params": params}


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)


def to_numpy(images: torch.Tensor) -> np.ndarray:
    return images.detach().permute(0, 2, 3, 1).numpy()

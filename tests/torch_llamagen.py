"""LlamaGen's generator in PyTorch, written apart from the one under test, as its reference.

Module names are those of LlamaGen's checkpoints. RoPE is a product of complex numbers.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


def linear(before: int, after: int) -> nn.Linear:
    return nn.Linear(before, after, bias=False)


def rotations(grid: tuple[int, int], head_dim: int) -> torch.Tensor:
    """A complex number for each token, prefix first, and each pair of a head's dimensions."""
    half = head_dim // 2
    frequencies = torch.tensor([1e4 ** (-2 * i / half) for i in range(half // 2)])
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (rows, columns)]
    cells = torch.polar(torch.ones(()), torch.cat(angles, dim=1))
    return torch.cat([torch.zeros(1, half, dtype=cells.dtype), cells])


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.wqkv, self.wo = linear(width, 3 * width), linear(width, width)

    def forward(self, x, turns):
        batch, tokens, width = x.shape
        heads = lambda y: y.view(batch, tokens, self.heads, -1)
        q, k, v = (heads(y) for y in self.wqkv(x).split(width, dim=-1))

        def turn(y):
            pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns[:tokens, None]).flatten(-2)

        scores = torch.einsum("bthd,bshd->bhts", turn(q), turn(k)) / q.shape[-1] ** 0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.wo(torch.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = -(-int(2 / 3 * 4 * width) // 256) * 256
        self.w1, self.w3 = linear(width, hidden), linear(width, hidden)
        self.w2 = linear(hidden, width)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width)
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x, turns):
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)


class LlamaGen(nn.Module):
    def __init__(self, *, layers, width, heads, codes, classes, grid=(16, 16)):
        super().__init__()
        self.classes, self.num_tokens = classes, grid[0] * grid[1]
        self.cls_embedding = ClassEmbedding(classes, width)
        self.tok_embeddings = nn.Embedding(codes, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.output = RMSNorm(width), linear(width, codes)
        self.turns = rotations(grid, width // heads)

    def forward(self, tokens, labels):
        """(B, N) tokens, of which the last is not read, and (B,) labels; logits (B, N, V)."""
        prefix = self.cls_embedding.embedding_table(labels)[:, None]
        x = torch.cat([prefix, self.tok_embeddings(tokens[:, :-1])], dim=1)
        for layer in self.layers:
            x = layer(x, self.turns)
        return self.output(self.norm(x))

    @torch.no_grad()
    def likeliest(self, labels, guidance: float):
        """Codes, each the likeliest after those before it, with guidance."""
        null = torch.full_like(labels, self.classes)
        tokens = torch.zeros(len(labels), 0, dtype=torch.long)
        for _ in range(self.num_tokens):
            padded = F.pad(tokens, (0, 1))
            with_class, without = (self(padded, x)[:, -1] for x in (labels, null))
            logits = without + guidance * (with_class - without)
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        return tokens


def random_llamagen(seed: int = 0, **sizes) -> LlamaGen:
    """Random weights of every kind, large enough for logits of all sizes."""
    torch.manual_seed(seed)
    model = LlamaGen(**sizes).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name:
                x.uniform_(0.5, 1.5)
            elif "embed" in name:
                x.normal_()
            else:
                x.normal_(0, 2 * x.shape[1] ** -0.5)
    return model

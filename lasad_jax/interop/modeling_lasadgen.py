"""LASADGen in PyTorch: class label and codes in, logits of the next code out.

    model = LASADGen.from_pretrained("DIR")      # needs torch and safetensors, nothing else
    logits = model(codes, labels)                # of every code, given the label and those before
    codes = model.generate(torch.tensor([3, 1, 4]), guidance_scale=2.0)

An image is a grid of R x C codes in raster order; one token for its class, the prefix, comes
first. LASAD is linear attention whose weights fall with the distance on that grid:

    o_t = sum over s <= t of  D(t, s) (q_t . k_s) v_s

    decay       D(t, s) for s <= t; 1 wherever s is the prefix
    none        1
    sequence    exp(-rate (t - s))
    raster      exp(-row_rate (r_t - r_s) - column_rate n), n the steps within rows
    manhattan   exp(-row_rate (r_t - r_s) - column_rate |c_t - c_s|)

Dimensions: B batch, N tokens (prefix included), D width, H heads, Dk and Dv of a head's key and
value, F feed-forward, R rows, C columns, V codes. Parameters, in the layout of torch's modules:

    token_embedding.weight             (V, D)
    class_embedding.weight             (classes + 1, D)     the last row is "no class"
    blocks.I.mixer_norm.weight         (D)
    blocks.I.mixer.q.weight, k.weight  (H Dk, D)
    blocks.I.mixer.v.weight            (H Dv, D)
    blocks.I.mixer.out_gate.weight     (H Dv, D)            not softmax
    blocks.I.mixer.decay_gate.weight   (H, D)               selective
    blocks.I.mixer.decay_gate.bias     (H)                  selective
    blocks.I.mixer.rate                (H)                  sequence; before softplus
    blocks.I.mixer.row_rate            (H)                  raster and manhattan; as rate
    blocks.I.mixer.column_rate         (H)                  raster and manhattan; as rate
    blocks.I.mixer.norm.weight         (H, Dv)              not softmax
    blocks.I.mixer.out.weight          (D, H Dv)
    blocks.I.ffn_norm.weight           (D)
    blocks.I.conv.weight               (D, 13)              local_conv; a column for each of TAPS
    blocks.I.ffn.gate.weight           (F, D)
    blocks.I.ffn.up.weight             (F, D)
    blocks.I.ffn.down.weight           (D, F)
    final_norm.weight                  (D)
    head.weight                        (V, D)

Activations have the dtype of the embeddings; norms, rotations, decays and the operator's state
are computed in float32 whatever it is.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NORM_EPSILON = 1e-5
ROPE_BASE = 1e4
# Rows down and columns to the right of each neighbour in the local convolution: the token, those
# to its left, then the row above it and the one above that.
TAPS = (
    *((0, 0), (0, -1), (0, -2)),
    *((-up, right) for up in (1, 2) for right in (-2, -1, 0, 1, 2)),
)
RATES = {
    "none": (),
    "sequence": ("rate",),
    "raster": ("row_rate", "column_rate"),
    "manhattan": ("row_rate", "column_rate"),
}
GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture, as in config.json. `decay` and `selective` are LASAD's."""

    vocab_size: int
    num_classes: int
    grid: tuple[int, int]
    num_layers: int
    width: int
    num_heads: int
    key_dim: int
    ffn_width: int
    mixer: str  # "lasad" or "softmax"
    decay: str
    selective: bool
    local_conv: bool
    rope: bool

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """The fields among `values`, which may hold others.

        Raises:
          ValueError: naming fields that are missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"config: {', '.join(missing)} missing; this is no LASADGen's")
        return cls(**{name: values[name] for name in names} | {"grid": tuple(values["grid"])})

    @property
    def value_dim(self) -> int:
        """Dv."""
        return self.width // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Codes of an image."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn.

    Attributes:
      guidance_scale: s of classifier-free guidance, u + s (c - u); 1 is none.
      guidance_schedule: how s grows from 1 over the tokens: "constant" (at once), "linear" or
        "power-cosine".
      guidance_power: exponent of the power-cosine schedule; larger rises later.
      temperature: divides the logits; 0 takes the likeliest code.
      top_k: draw among the k likeliest codes; 0 for all.
      top_p: draw among the fewest codes whose probability reaches p; 1 for all.
    """

    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    guidance_power: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"guidance_schedule: {self.guidance_schedule!r} is not one of {GUIDANCE_SCHEDULES}"
            )
        for name in ("guidance_scale", "temperature", "top_k"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name}: {value} must be at least 0")
        if not self.guidance_power > 0:
            raise ValueError(f"guidance_power: {self.guidance_power} must be positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must be in (0, 1]")


# Layers


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, the mean over the last axis."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + NORM_EPSILON)
        return (y * self.weight.float()).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def turns(config: ModelConfig, index: int, num: int, device: torch.device) -> Tensor | None:
    """Cosine and sine, (num, Dk / 2, 2), by which 2D RoPE turns the pairs of the tokens that
    `index` others come before: half of them by row, half by column. The prefix has no place:
    LASAD leaves it as it is, LlamaGen's softmax takes it to zero."""
    if not config.rope:
        return None
    half = config.key_dim // 2
    frequencies = ROPE_BASE ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    token = torch.arange(index, index + num)
    rows, columns = (token - 1) // config.grid[1], (token - 1) % config.grid[1]
    angles = torch.cat([x[:, None] * frequencies for x in (rows, columns)], dim=1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    table[token == 0] = torch.tensor([float(config.mixer == "lasad"), 0.0], dtype=table.dtype)
    return table.to(device, torch.float32)


def rotate(x: Tensor, turns: Tensor | None) -> Tensor:
    """Turns each pair (2i, 2i + 1) of x, (B, N, H, Dk), by its token's place."""
    if turns is None:
        return x
    cos, sin = turns[:, None].unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class LocalConv(nn.Module):
    """Causal 5x5 depthwise convolution on the grid: x plus a weighted sum, per channel, of the
    token and its twelve earlier neighbours. Nothing wraps around the end of a row; the prefix is
    nobody's neighbour."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.columns = config.grid[1]
        self.weight = nn.Parameter(torch.zeros(config.width, len(TAPS)))

    def init_recent(self, batch: int) -> Tensor:
        """Before any token."""
        return self.weight.new_zeros(batch, 2 * self.columns + 2, len(self.weight))

    def forward(self, x: Tensor, recent: Tensor | None, index: int) -> Tensor:
        """Of a whole sequence or, with `recent`, of token number `index`.

        `recent`, (B, W, D), is the ring of the W = 2 C + 2 newest inputs, slot i % W for token i.
        """
        own, *weights = self.weight.float().unbind(1)
        place = index + torch.arange(x.shape[1], device=x.device) - 1
        y = x.float() * (1 + own)
        for (down, right), weight in zip(TAPS[1:], weights, strict=True):
            # In a narrow grid no token has a neighbour that would lie ahead.
            back, column = max(0, -down * self.columns - right), place % self.columns + right
            exists = (place >= back) & (place >= 0) & (column >= 0) & (column < self.columns)
            if recent is None:
                neighbour = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
            else:
                neighbour = recent[:, [(index - back) % recent.shape[1]]]
            y = y + torch.where(exists[:, None], neighbour.float() * weight, 0.0)
        if recent is not None:
            recent[:, index % recent.shape[1]] = x[:, 0]
        return y.to(x.dtype)


# The operator


def pair_log_decay(decay: str, rates: list[Tensor], place: Tensor, columns: int) -> Tensor:
    """log D(t, s) of grid tokens by their raster index, (H, n, n); for s <= t."""
    between = lambda x: (x[:, None] - x[None, :]).float()
    weighted = lambda rate, distance: -rate[:, None, None] * distance
    rows, tokens = between(place // columns), between(place)
    if decay in ("none", "sequence"):
        return weighted(rates[0], tokens)
    across = tokens - rows if decay == "raster" else between(place % columns).abs()
    return weighted(rates[0], rows) + weighted(rates[1], across)


def step_log_factor(decay: str, rates: list[Tensor], place: int, columns: int) -> Tensor:
    """g, (H), of the recurrence S_t = exp(g_t) S_(t-1) + k_t v_t^T; `manhattan` is none."""
    if decay in ("none", "sequence"):
        return -rates[0]
    return -rates[0] if place % columns == 0 else -rates[1]


def running_differences(g: Tensor) -> Tensor:
    """b_t - b_s, (..., N, N), for the running sum b of g, (..., N), non-positive.

    Far down a float32 sum neighbours would differ by rounding: multiples of 1/64, which add
    without error, are summed apart from the rest. (exp(-256) is 0.)
    """
    g = g.clamp(min=-256)
    coarse = (g * 64).round() / 64
    sums = (coarse.cumsum(-1), (g - coarse).cumsum(-1))
    return sum(b[..., :, None] - b[..., None, :] for b in sums)


@dataclasses.dataclass
class LASADState:
    """All that a LASAD layer remembers; it does not grow with the tokens seen.

    Attributes:
      prefix_k, prefix_v: key and value of the prefix, (B, H, Dk) and (B, H, Dv).
      memory: decayed sum of k v^T as of the last token, (B, H, Dk, Dv) in float32; for
        `manhattan` (B, H, C, Dk, Dv), each column as of its own last token.
    """

    prefix_k: Tensor
    prefix_v: Tensor
    memory: Tensor


class LASADMixer(nn.Module):
    """Gated linear attention with a decay over true grid positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, heads = config.width, config.num_heads
        self.q = nn.Linear(width, heads * config.key_dim, bias=False)
        self.k = nn.Linear(width, heads * config.key_dim, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out_gate = nn.Linear(width, width, bias=False)
        self.decay_gate = nn.Linear(width, heads) if config.selective else None
        for name in RATES[config.decay]:
            self.register_parameter(name, nn.Parameter(torch.zeros(heads)))
        self.norm = RMSNorm(heads, config.value_dim)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> LASADState:
        """Before any token."""
        config, Dk, Dv = self.config, self.config.key_dim, self.config.value_dim
        zeros = lambda *shape: self.q.weight.new_zeros((batch, *shape), dtype=torch.float32)
        columns = config.grid[1:] if config.decay == "manhattan" else ()
        return LASADState(
            prefix_k=zeros(config.num_heads, Dk),
            prefix_v=zeros(config.num_heads, Dv),
            memory=zeros(config.num_heads, *columns, Dk, Dv),
        )

    def forward(
        self, x: Tensor, turns: Tensor | None, state: LASADState | None, index: int
    ) -> Tensor:
        """Of a whole sequence (B, N, D) or, with a state, which it updates, of token `index`."""
        config, heads = self.config, self.config.num_heads
        split = lambda y: y.float().unflatten(-1, (heads, -1))
        q = rotate(F.silu(split(self.q(x))), turns) * config.key_dim**-0.5
        k = rotate(F.silu(split(self.k(x))), turns)
        v = split(self.v(x))
        log_gate = None
        if self.decay_gate is not None:
            gate = F.linear(x, self.decay_gate.weight).float() + self.decay_gate.bias.float()
            log_gate = -F.softplus(gate)
        rates = [F.softplus(getattr(self, name).float()) for name in RATES[config.decay]]
        rates = rates or [q.new_zeros(heads)]  # "none" is a sequence's decay at rate 0
        if state is None:
            out = self._parallel(q, k, v, rates, log_gate)
        else:
            one = (y if y is None else y[:, 0] for y in (q, k, v, log_gate))
            out = self._recurrent(*one, rates, state, index)[:, None]
        out = self.norm(out) * F.silu(split(self.out_gate(x)))
        return self.out(out.flatten(-2).to(x.dtype))

    def _parallel(self, q, k, v, rates, log_gate) -> Tensor:
        """The sum as it is written, for all tokens at once."""
        N, place = q.shape[1], torch.arange(q.shape[1] - 1, device=q.device)
        log_weights = pair_log_decay(self.config.decay, rates, place, self.config.grid[1])
        if log_gate is not None:
            log_weights = log_weights + running_differences(log_gate[:, 1:].transpose(1, 2))
        # A row and a column of zeros for the prefix, which nothing lets fade.
        log_weights = F.pad(log_weights, (1, 0, 1, 0))
        later = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
        weights = log_weights.masked_fill(later, -math.inf).exp()
        scores = torch.einsum("bthd,bshd->bhts", q, k) * weights
        return torch.einsum("bhts,bshe->bthe", scores, v)

    def _recurrent(self, q, k, v, log_gate, rates, state: LASADState, index: int) -> Tensor:
        """The same for one token, from the state alone: q, k, v without the axis of tokens."""
        config, place, columns = self.config, index - 1, self.config.grid[1]
        if place < 0:
            state.prefix_k, state.prefix_v = k, v
            return (q * k).sum(-1, keepdim=True) * v
        from_prefix = (q * state.prefix_k).sum(-1, keepdim=True) * state.prefix_v
        outer = k[..., :, None] * v[..., None, :]
        if config.decay == "manhattan":
            row_rate, column_rate = rates
            column, fall = place % columns, torch.exp(-row_rate)
            own = state.memory[:, :, column]
            own.mul_(fall[:, None, None]).add_(outer)
            # Columns further right were last written one row above.
            away = torch.arange(columns, device=q.device) - column
            weights = torch.exp(-column_rate[:, None] * away.abs())
            weights = torch.where(away > 0, weights * fall[:, None], weights)
            return from_prefix + torch.einsum("bhd,bhcde,hc->bhe", q, state.memory, weights)
        g = step_log_factor(config.decay, rates, place, columns)
        g = g if log_gate is None else g + log_gate
        state.memory.mul_(g.exp()[..., None, None]).add_(outer)
        return from_prefix + torch.einsum("bhd,bhde->bhe", q, state.memory)


@dataclasses.dataclass
class SoftmaxState:
    """Keys and values, (B, H, 1 + R C, Dv), of every token so far."""

    k: Tensor
    v: Tensor


class SoftmaxMixer(nn.Module):
    """Causal softmax attention with 2D rotary embedding, as in LlamaGen."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        linear = lambda: nn.Linear(config.width, config.width, bias=False)
        self.q, self.k, self.v, self.out = linear(), linear(), linear(), linear()

    def init_state(self, batch: int) -> SoftmaxState:
        """Before any token, with room for a whole image."""
        config = self.config
        shape = (batch, config.num_heads, 1 + config.num_tokens, config.value_dim)
        return SoftmaxState(self.k.weight.new_zeros(shape), self.v.weight.new_zeros(shape))

    def forward(
        self, x: Tensor, turns: Tensor | None, state: SoftmaxState | None, index: int
    ) -> Tensor:
        """As `LASADMixer`'s."""
        split = lambda y: y.unflatten(-1, (self.config.num_heads, -1))
        q, k = rotate(split(self.q(x)), turns), rotate(split(self.k(x)), turns)
        q, k, v = (y.transpose(1, 2) for y in (q, k, split(self.v(x))))
        if state is not None:
            state.k[:, :, [index]], state.v[:, :, [index]] = k, v
            k, v = state.k[:, :, : index + 1], state.v[:, :, : index + 1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=state is None)
        return self.out(out.transpose(1, 2).flatten(-2))


MIXERS = {"lasad": LASADMixer, "softmax": SoftmaxMixer}


# The network


@dataclasses.dataclass
class LayerState:
    """What a layer remembers: its mixer and, as `recent`, its local convolution."""

    mixer: LASADState | SoftmaxState
    recent: Tensor | None


class Block(nn.Module):
    """A mixer and a feed-forward, which sees a token's neighbourhood as well, on the residual
    stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.width)
        self.mixer = MIXERS[config.mixer](config)
        self.ffn_norm = RMSNorm(config.width)
        self.conv = LocalConv(config) if config.local_conv else None
        self.ffn = FeedForward(config)

    def init_state(self, batch: int) -> LayerState:
        """Before any token."""
        recent = None if self.conv is None else self.conv.init_recent(batch)
        return LayerState(self.mixer.init_state(batch), recent)

    def forward(
        self,
        x: Tensor,
        turns: Tensor | None,
        state: LayerState | None = None,
        index: int = 0,
    ) -> Tensor:
        """Of a whole sequence (B, N, D) or, with a state, which it updates, of token `index`."""
        mixer, recent = (None, None) if state is None else (state.mixer, state.recent)
        x = x + self.mixer(self.mixer_norm(x), turns, mixer, index)
        y = self.ffn_norm(x)
        if self.conv is not None:
            y = self.conv(y, recent, index)
        return x + self.ffn(y)


class LASADGen(nn.Module):
    """The generator.

    Attributes:
      config: the architecture.
      sampling: how `generate` draws unless told otherwise.
    """

    def __init__(self, config: ModelConfig, sampling: SamplingConfig | None = None):
        super().__init__()
        self.config, self.sampling = config, sampling or SamplingConfig()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "LASADGen":
        """The model in a folder, ready for evaluation.

        Args:
          directory: with config.json and model.safetensors (or its parts and their index); and
            generation_config.json, if there are defaults for sampling.
          dtype: of matrices and activations; as stored if unset.
          device: where to put it.

        Raises:
          FileNotFoundError, ValueError: files that are missing, damaged or do not fit together.
        """
        directory = Path(directory)
        config = ModelConfig.from_dict(json.loads((directory / "config.json").read_text()))
        sampling, file = {}, directory / "generation_config.json"
        if file.exists():
            known = {field.name for field in dataclasses.fields(SamplingConfig)}
            sampling = {k: v for k, v in json.loads(file.read_text()).items() if k in known}
        with torch.device("meta"):
            model = cls(config, SamplingConfig(**sampling))
        tensors = read_weights(directory)
        wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        problems = [f"{name} is missing" for name in wanted if name not in found]
        problems += [f"{name} is unknown" for name in found if name not in wanted]
        problems += [
            f"{name} has shape {found[name]}, expected {shape}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ]
        if problems:
            raise ValueError(
                f"{directory}: {len(problems)} tensors do not fit config.json: "
                + "; ".join(problems[:3])
            )
        if dtype is not None:
            tensors = {k: x.to(dtype) if is_matrix(k) else x for k, x in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        return model.to(device).eval()

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits of every code given the label and the codes before it.

        Memory is quadratic in N here, constant in `step` and `generate`.

        Args:
          codes: (B, N), an image's codes in raster order, or its first N; the last is only
            predicted, never read.
          labels: (B), 0 to num_classes - 1, or num_classes for none.

        Returns:
          (B, N, V) in float32; row i predicts codes[:, i].
        """
        prefix = self.class_embedding(labels)[:, None]
        x = torch.cat([prefix, self.token_embedding(codes[:, :-1])], dim=1)
        return self._logits(x, [None] * len(self.blocks), 0)

    def init_states(self, batch: int) -> list[LayerState]:
        """What each layer remembers before any token."""
        return [block.init_state(batch) for block in self.blocks]

    def step(self, tokens: Tensor, states: list[LayerState], index: int) -> Tensor:
        """Reads token number `index` of each image and updates the states.

        Args:
          tokens: (B), labels for index 0, then codes one after the other.
          states: of `init_states`, after `index` tokens.
          index: how many tokens came before.

        Returns:
          (B, V) in float32, the logits of code number `index`.
        """
        embedding = self.token_embedding if index else self.class_embedding
        return self._logits(embedding(tokens)[:, None], states, index)[:, 0]

    def _logits(self, x: Tensor, states: list, index: int) -> Tensor:
        by = turns(self.config, index, x.shape[1], x.device)
        for block, state in zip(self.blocks, states, strict=True):
            x = block(x, by, state, index)
        return self.head(self.final_norm(x)).float()

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        given: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        **changes,
    ) -> Tensor:
        """Draws images code by code, in memory that does not grow with their number.

        Args:
          labels: (B), the class of each image; num_classes for none.
          given: (B, n), the first n codes of each image, kept as they are; none if unset.
          generator: of random numbers, on the model's device; torch's own if unset.
          changes: fields of `SamplingConfig` that differ from `sampling`.

        Returns:
          (B, R C), all codes of each image.

        Raises:
          ValueError: labels or codes that are none, or a field of no good value.
        """
        config, sampling = self.config, dataclasses.replace(self.sampling, **changes)
        given = labels.new_zeros(len(labels), 0) if given is None else given
        _check(config, labels, given)
        num_given, guided = given.shape[1], sampling.guidance_scale != 1
        codes = labels.new_zeros(len(labels), config.num_tokens)
        codes[:, :num_given] = given
        # Guidance runs both halves as one batch: first with the class, then without.
        double = lambda x: torch.cat([x, x]) if guided else x
        null = torch.full_like(labels, config.num_classes)
        tokens = torch.cat([labels, null]) if guided else labels
        states = self.init_states(len(tokens))
        for i in range(config.num_tokens):
            logits = self.step(tokens, states, i)
            if i >= num_given:
                if guided:
                    scale = guidance_scale(sampling, i, config.num_tokens)
                    conditional, unconditional = logits.chunk(2)
                    logits = unconditional + scale * (conditional - unconditional)
                codes[:, i] = draw(logits, sampling, generator)
            tokens = double(codes[:, i])
        return codes


def is_matrix(name: str) -> bool:
    """Whether a parameter has the dtype of activations; norms, rates and biases have float32."""
    return name.endswith(".weight") and not name.endswith("norm.weight")


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors or of the parts that its index names."""
    files = ["model.safetensors"]
    if (index := directory / "model.safetensors.index.json").exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for file in files:
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory}: {file} is missing")
        try:
            tensors |= load_file(directory / file)
        except SafetensorError as error:
            raise ValueError(f"{directory}: {file} is damaged ({error})") from error
    return tensors


def _check(config: ModelConfig, labels: Tensor, given: Tensor) -> None:
    if labels.numel() == 0 or labels.min() < 0 or labels.max() > config.num_classes:
        raise ValueError(
            f"labels: {labels.tolist()} must be one or more of 0 to {config.num_classes - 1}, or "
            f"{config.num_classes} for none"
        )
    if given.shape[0] != len(labels) or given.shape[1] > config.num_tokens:
        raise ValueError(
            f"given: expected ({len(labels)}, up to {config.num_tokens}) codes, got "
            f"{tuple(given.shape)}"
        )
    if given.numel() and (given.min() < 0 or given.max() >= config.vocab_size):
        raise ValueError(f"given: codes must be 0 to {config.vocab_size - 1}")


# Drawing a code


def guidance_scale(sampling: SamplingConfig, token: int, num_tokens: int) -> float:
    """The scale s for token number `token` of `num_tokens`."""
    done = token / max(num_tokens - 1, 1)
    rise = {
        "constant": 1.0,
        "linear": done,
        "power-cosine": (1 - math.cos(math.pi * done**sampling.guidance_power)) / 2,
    }[sampling.guidance_schedule]
    return 1 + (sampling.guidance_scale - 1) * rise


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest (ties with the k-th stay)."""
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest likeliest codes whose probability reaches p (ties with the
    last of them stay, and the likeliest does whatever p)."""
    ordered = logits.sort(dim=-1, descending=True).values
    probability = ordered.softmax(-1)
    needed = probability.cumsum(-1) - probability < p
    last = needed.sum(-1, keepdim=True).clamp(min=1) - 1
    return logits.masked_fill(logits < ordered.gather(-1, last), -math.inf)


def draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None) -> Tensor:
    """One code for each image, (B), from logits (B, V)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

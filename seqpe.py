"""SeqPE: Transformer with Sequential Position Encoding (Li et al., arXiv 2506.13277), in one file.

A position is a number, and a number can be written: (2, 13) becomes the digits 0 2 1 3. SeqPE lets a
small transformer read those digits and say where that is. Whatever can be written can be encoded, whether
training ever went there or not; two regularisers keep the places it never went in good order. In this order:

    1. Positions as digits      position_to_digits, digits_to_position, window
    2. The transformer block    Signal, Attention, Block: the same for encoder, GPT and ViT
    3. The sequential encoder   SeqPE: digits -> e_p
    4. The two regularisers     contrastive_loss (L_delta), distillation_loss (L_OOD), position_regularizers;
                                place_windows: start shifting
    5. Position encodings       seqpe and what it is compared with, behind one small interface
    6. Models                   GPT, ViT

To use it in a model of your own, import SeqPE and position_regularizers; the README has a complete example.
Shapes: B batch, T positions, C model width, H heads, D channels a head (C / H), K symbols a position,
P pivots, M candidates a pivot, S students, m positions of a student.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------
# 1. Positions as digits (paper, section 3.1)


def position_to_digits(positions, n_digits, base=10, check=True):
    """Write positions in `base`, most significant digit first, padded with zeros: (2, 13) -> 0 2 1 3.

    positions: (..., n_dim) integers from 0 to base ** n_digits - 1 -> (..., n_dim * n_digits) digits.
    TypeError for positions that are not integers, ValueError for one that cannot be written. check=False is
    for positions that cannot be wrong: looking at them would make the host wait for a GPU.
    """
    limit = _number_of_positions(n_digits, base)
    kind = positions.dtype if torch.is_tensor(positions) else type(positions).__name__
    if kind not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"positions must be a tensor of integers, not {kind}")
    if positions.dim() == 0:
        raise ValueError("positions must have a last dimension of size n_dim, got a scalar")
    if check and positions.numel():
        lowest, highest = int(positions.min()), int(positions.max())
        if lowest < 0:
            raise ValueError(f"positions must not be negative, got {lowest}")
        if highest >= limit:
            raise ValueError(f"position {highest} is past the limit: {n_digits} digits in base {base} write "
                             f"0 to {limit - 1}; it needs n_digits={digits_needed(highest, base)}")
    place_values = base ** torch.arange(n_digits - 1, -1, -1, device=positions.device)     # ..., 100, 10, 1
    return (positions.long().unsqueeze(-1) // place_values % base).flatten(-2)


def digits_to_position(digits, n_digits, base=10, check=True):
    """The inverse of position_to_digits: (..., n_dim * n_digits) digits -> (..., n_dim) positions, int64."""
    _number_of_positions(n_digits, base)
    if digits.size(-1) % n_digits:
        raise ValueError(f"{digits.size(-1)} digits are no whole number of positions of n_digits={n_digits}")
    if check and ((digits < 0) | (digits >= base)).any():
        raise ValueError(f"digits in base {base} are 0 to {base - 1}, got {digits.min()} to {digits.max()}")
    place_values = base ** torch.arange(n_digits - 1, -1, -1, device=digits.device)
    return (digits.long().unflatten(-1, (-1, n_digits)) * place_values).sum(-1)


def digits_needed(position, base=10):
    """How many digits it takes to write `position`."""
    return 1 if position < base else 1 + digits_needed(position // base, base)


def _number_of_positions(n_digits, base):
    if base < 2 or n_digits < 1:
        raise ValueError(f"base must be at least 2 and n_digits at least 1, got {base} and {n_digits}")
    if base ** n_digits > 2 ** 63:
        raise ValueError(f"base {base} with n_digits={n_digits} writes numbers that no 64-bit integer holds")
    return base ** n_digits


def window(shape):
    """All positions of a box, row by row: shape (T,) for text, (h, w) for images, ... -> (T, n_dim)."""
    return torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape))


# ------------------------------------------------------------------------------------------------------------
# 2. The transformer block, and how any position encoding meets attention


class Signal(NamedTuple):
    """What a position encoding tells one layer: five channels, None where it has nothing to say.

    The dimension of 2 is (for queries, for keys), in rotate (cos, sin). B is left out where all sequences of
    the batch have the same positions.
    """
    input: Optional[Tensor] = None   # (B, T, C)          x_i + input_i
    rotate: Optional[Tensor] = None  # (2, B, H, T, D/2)  q_i and k_j turned by an angle; H may be 1
    mul: Optional[Tensor] = None     # (2, B, H, T, D)    q_i * mul_i, k_j * mul_j
    add: Optional[Tensor] = None     # (2, B, H, T, D)    q_i + add_i, k_j + add_j
    extend: Optional[Tensor] = None  # (2, B, H, T, E)    q_i . k_j + extend_i . extend_j

    def at(self, rows):
        """The signal of some of the positions alone; rows: a slice, or indices."""
        return Signal(*(t if t is None else t[..., rows, :] for t in self))


def _rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by an angle each (Su et al. 2021, equation 34)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head self-attention, and the only place that knows what a signal does to queries and keys."""

    def __init__(self, n_embd, n_head, causal=True, dropout=0.0):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.query = nn.Linear(n_embd, n_embd)
        self.key_value = nn.Linear(n_embd, 2 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, signal=Signal(), cache=None, last_only=False):
        """x: (B, T, C) -> (B, T, C), or (B, 1, C) when only the last token asks (without a signal then).

        cache: a dict that keeps the keys and values of earlier tokens; once it does, x is one token more.
        """
        q = self.query(x[:, -1:] if last_only else x)
        k, v = self.key_value(x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        D = q.size(-1)

        if signal.mul is not None:
            q, k = q * signal.mul[0], k * signal.mul[1]
        if signal.add is not None:
            q, k = q + signal.add[0], k + signal.add[1]
        if signal.rotate is not None:
            q, k = _rotate(q, *signal.rotate), _rotate(k, *signal.rotate)
        if signal.extend is not None:
            # The sum of two dot products is that of concatenated vectors: no (T, T) bias is ever built.
            for_q, for_k = (t.expand(*q.shape[:-1], -1).type_as(q) for t in signal.extend)
            q, k = torch.cat([q, for_q], dim=-1), torch.cat([k, for_k], dim=-1)    # (B, H, T, D + E)
            v = F.pad(v, (0, k.size(-1) - D))           # the fused CPU kernel wants v as wide as q and k
        if cache is not None:
            if cache:
                if q.size(2) != 1:
                    raise ValueError(f"a cache in use takes one token at a time, got {q.size(2)}")
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = k, v

        # A single query is that of the last token, which sees everything.
        is_causal = self.causal and q.size(2) > 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=D ** -0.5)   # (B, H, T, D + E)
        return self.dropout(self.proj(y[..., :D].transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A pre-norm transformer layer (GPT-2's), for the encoder, GPT and ViT alike.

    gelu: "none", or "tanh" for GPT-2's approximation, which the paper's encoder uses; it is slower on a CPU.
    """

    def __init__(self, n_embd, n_head, causal=True, dropout=0.0, gelu="none"):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd={n_embd} is not divisible by n_head={n_head}")
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, causal, dropout)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(approximate=gelu),
                                 nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout))

    def forward(self, x, signal=Signal(), cache=None, last_only=False):
        if signal.input is not None:
            x = x + signal.input
        x = (x[:, -1:] if last_only else x) + self.attn(self.ln_1(x), signal, cache, last_only)
        return x + self.mlp(self.ln_2(x))


def _at_least_one(**sizes):
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _init_weights(module):
    """GPT-2's initialisation."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------
# 3. The sequential encoder (paper, section 3.1)


class SeqPE(nn.Module):
    """Reads the digits of a position and returns its embedding e_p, of size n_embd.

    n_head: heads of the encoder, and of the attention e_p is meant for. n_dim: coordinates of a position,
    each from 0 to max_position - 1, where max_position = base ** n_digits. width: of the encoder, n_embd
    unless given.
    """

    def __init__(self, n_embd, n_head=4, n_layer=2, n_dim=1, n_digits=4, base=10, width=None, dropout=0.0):
        super().__init__()
        width = width or n_embd
        _at_least_one(n_embd=n_embd, n_head=n_head, n_layer=n_layer, n_dim=n_dim, width=width)
        if n_embd % n_head or width % n_head:
            raise ValueError(f"SeqPE: n_embd={n_embd} and width={width} must be divisible by n_head={n_head}")
        self.max_position = _number_of_positions(n_digits, base)
        self.n_embd, self.n_head, self.n_dim, self.n_digits, self.base = n_embd, n_head, n_dim, n_digits, base
        self.symbol = nn.Embedding(base, width)         # T: which digit
        self.place = nn.Embedding(n_digits, width)      # O: at which place of its number
        self.dimension = nn.Embedding(n_dim, width) if n_dim > 1 else None      # D: of which coordinate
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, n_head, True, dropout, "tanh") for _ in range(n_layer))
        self.ln = nn.LayerNorm(width)
        self.proj = nn.Linear(width, n_embd)
        self.apply(_init_weights)
        for embedding in filter(None, (self.symbol, self.place, self.dimension)):
            nn.init.normal_(embedding.weight)   # far apart: fine distances are learned sooner than from 0.02

    def forward(self, positions, check=True):
        """positions: (..., n_dim) integers, or plain (...,) ones when n_dim is 1 -> e_p: (..., n_embd).

        A last dimension of 1 is always taken for n_dim: (B, 1) gives (B, n_embd), (B, 1, 1) gives
        (B, 1, n_embd). Errors as position_to_digits. Positions on the CPU are checked without waiting for the
        encoder's GPU.
        """
        plain = self.n_dim == 1 and torch.is_tensor(positions)
        if plain and (positions.dim() < 2 or positions.size(-1) != 1):
            positions = positions.unsqueeze(-1)
        digits = position_to_digits(positions, self.n_digits, self.base, check)         # (..., K)
        if positions.size(-1) != self.n_dim:
            raise ValueError(f"the last dimension of positions must be n_dim={self.n_dim}, "
                             f"got shape {tuple(positions.shape)}")
        digits = digits.to(self.cls.device)
        x = self.symbol(digits.reshape(-1, self.n_dim, self.n_digits)) + self.place.weight
        if self.dimension is not None:
            x = x + self.dimension.weight.unsqueeze(1)      # (N, n_dim, n_digits, width), N positions
        x = torch.cat([x.flatten(1, 2), self.cls.expand(x.size(0), 1, -1)], dim=1)      # (N, K + 1, width)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, last_only=True)              # only [CLS] is read, so only [CLS] asks
        # All e_p of the same length in each head: a dot product then says how near, and nothing else. With
        # e_p . e_p = 32, the softmax over thirty candidates in L_delta can become sure of one.
        e = F.normalize(self.proj(self.ln(x[:, 0])).unflatten(-1, (self.n_head, -1)), dim=-1)
        return (32 ** 0.5 * e).reshape(*digits.shape[:-1], self.n_embd)


# ------------------------------------------------------------------------------------------------------------
# 4. The two regularisers, and start shifting (paper, section 3.2)


def sample_hard_negatives(pivots, n_samples, n_digits, base=10, generator=None):
    """Positions written much like the pivot: (P, n_dim) -> (P, n_samples, n_dim).

    1 to 3 random edits of its K digits. An edit inserts a digit (the leading one drops out), deletes one (a
    zero moves in at the front), swaps two neighbours or replaces one, so every result can be written.
    """
    digits = position_to_digits(pivots, n_digits, base, check=False).unsqueeze(1).repeat(1, n_samples, 1)
    K, device = digits.size(-1), pivots.device
    keep, new, zero = list(range(K)), [K], [K + 1]          # which of its K digits, a new one, a zero
    edits = torch.tensor([[keep[1:at + 1] + new + keep[at + 1:],                    # insert
                           zero + keep[:at] + keep[at + 1:],                        # delete
                           keep[:at] + keep[at:at + 2][::-1] + keep[at + 2:],       # swap
                           keep[:at] + new + keep[at + 1:]] for at in keep], device=device)     # replace

    def draw(high):
        return torch.randint(high, (*digits.shape[:-1], 1), generator=generator, device=device)

    n_edits = draw(3)
    for i in range(3):
        which, at = draw(4).squeeze(-1), draw(K).squeeze(-1)
        choices = F.pad(torch.cat([digits, draw(base)], dim=-1), (0, 1))            # (P, n_samples, K + 2)
        digits = torch.where(i <= n_edits, choices.gather(-1, edits[at, which]), digits)
    return digits_to_position(digits, n_digits, base, check=False)


def sample_groups(n_groups, n_candidates, n_dim, n_digits, base=10, mix=(0.2, 0.1, 0.7), generator=None,
                  device=None):
    """Groups of positions to compare, a pivot and its M candidates: (P, 1 + M, n_dim), the pivot first.

    They are drawn in one of three ways, with the probabilities of `mix` (the paper's are 0.5, 0.3, 0.2):
    uniformly from all positions; so, with a fifth replaced by hard negatives; uniformly from a window around
    the pivot, so that close numbers must be told apart. The window's size is random on a logarithmic scale,
    small ones the likeliest, which orders the space at every scale. One that hits the pivot moves one on.
    """
    max_position = _number_of_positions(n_digits, base)
    _at_least_one(n_groups=n_groups, n_candidates=n_candidates)
    if max_position > 2 ** 24:
        raise ValueError(f"{max_position} positions: single precision can sample from {2 ** 24} at most")
    draw = dict(generator=generator, device=device)
    pivots = torch.randint(max_position, (n_groups, 1, n_dim), **draw)
    candidates = torch.randint(max_position, (n_groups, n_candidates, n_dim), **draw)

    n_hard = n_candidates // 5
    hard = sample_hard_negatives(pivots.squeeze(1), n_hard, n_digits, base, generator)
    hard = torch.cat([hard, candidates[:, n_hard:]], dim=1)

    smallest = min(4, max_position)
    size = smallest * (max_position / smallest) ** torch.rand(pivots.shape[:2] + (1,), **draw).square()
    start = (pivots - torch.rand(pivots.shape, **draw) * size).clamp(min=0).minimum(max_position - size)
    close = (start + torch.rand(candidates.shape, **draw) * size).long().clamp(max=max_position - 1)

    way = torch.rand(n_groups, 1, 1, **draw)
    candidates = torch.where(way < mix[0], candidates, torch.where(way < mix[0] + mix[1], hard, close))
    hit = (candidates == pivots).all(-1)
    candidates[..., -1] = (candidates[..., -1] + hit.long()) % max_position
    return torch.cat([pivots, candidates], dim=1)


def contrastive_loss(e, positions, n_head=1):
    """L_delta, equation 3: cross-entropy over the dot products e_p . e_c, the nearest candidate being right.

    e: (P, N, C) embeddings of P groups of positions (P, N, n_dim) -> scalar. Each position of a group takes
    its turn as the pivot p, the others are its candidates c: N times the comparisons for the same embeddings.
    Copies of the pivot, and other candidates as near as the nearest, do not count. Each head is compared by
    itself.
    """
    same = (positions.unsqueeze(-2) == positions.unsqueeze(-3)).all(-1)             # (P, N, N)
    distance = (positions.unsqueeze(-2) - positions.unsqueeze(-3)).pow(2).sum(-1)   # squared
    distance = distance.masked_fill(same, torch.iinfo(torch.int64).max)
    least, nearest = distance.min(-1, keepdim=True)                                 # (P, N, 1)
    ties = (distance == least).scatter(-1, nearest, False)
    e = e.unflatten(-1, (n_head, -1)).transpose(1, 2)                               # (P, H, N, D)
    logits = (e @ e.transpose(-2, -1)).masked_fill((same | ties).unsqueeze(1), -math.inf)
    return F.cross_entropy(logits.flatten(0, 2), nearest.flatten(1).repeat(1, n_head).flatten())


def place_windows(shape, n_windows, max_position, n_pieces=1, generator=None, device=None):
    """Start shifting: the training window at random places -> positions (n_windows, T, n_dim).

    shape: the training window, (T,) or (h, w). With n_pieces > 1 each axis is cut at random into pieces that
    keep their order but lie further apart, so that a short window has long distances in it (PoSE, Zhu et al.
    2024).
    """
    _at_least_one(n_windows=n_windows, n_pieces=n_pieces)
    if max(shape) > max_position:
        raise ValueError(f"a window of shape {tuple(shape)} does not fit into 0 to {max_position - 1}")
    draw = dict(generator=generator, device=device)
    offsets = torch.stack([torch.randint(max_position - size + 1, (n_windows, n_pieces), **draw).sort().values
                           for size in shape], dim=-1)                          # (n_windows, n_pieces, n_dim)
    places = window(shape).to(offsets.device)                                           # (T, n_dim)
    size = torch.tensor(shape, device=places.device)
    cuts = torch.rand(n_windows, 1, n_pieces - 1, len(shape), **draw) * size          # on each axis
    piece = (places.unsqueeze(1) >= cuts).sum(2)        # cuts before each place: (n_windows, T, n_dim)
    return places + offsets.gather(1, piece)


def distillation_loss(e_teacher, e_students, n_head):
    """L_OOD, equation 4: a window far away gets the inner geometry of the training window.

    e_teacher: (m, C), which receives no gradient; e_students: (S, m, C) -> scalar. In each set and head the
    dot products of a position with all others become a distribution, a softmax over the row. The loss is the
    symmetric KL divergence of students' rows from the teacher's, summed over a row, averaged over rows.
    """
    def rows(e):
        e = e.unflatten(-1, (n_head, -1)).transpose(-3, -2)     # (..., H, m, D)
        return F.log_softmax(e @ e.transpose(-2, -1), dim=-1)   # (..., H, m, m)

    teacher, students = rows(e_teacher.detach()), rows(e_students)
    # KL(t || s) + KL(s || t) = sum (t - s) (log t - log s)
    return ((teacher.exp() - students.exp()) * (teacher - students)).sum(-1).mean()


def position_regularizers(encoder, shape, contrastive_weight=0.1, distill_weight=0.1, n_groups=4,
                          n_candidates=32, n_students=4, n_samples=32, generator=None):
    """contrastive_weight * L_delta + distill_weight * L_OOD, a scalar: what a step adds to the model's loss.

    encoder: a SeqPE; shape: the training window, (T,) or (h, w). generator: on the encoder's device.
    """
    if len(shape) != encoder.n_dim:
        raise ValueError(f"a window of shape {tuple(shape)} is not of the encoder's n_dim={encoder.n_dim}")
    _at_least_one(n_students=n_students, n_samples=n_samples)
    loss = torch.zeros((), device=encoder.cls.device)
    draw = dict(generator=generator, device=loss.device)
    if contrastive_weight:
        groups = sample_groups(n_groups, n_candidates, encoder.n_dim, encoder.n_digits, encoder.base, **draw)
        e = encoder(groups, check=False)
        loss = loss + contrastive_weight * contrastive_loss(e, groups, encoder.n_head)
    if distill_weight:
        students = place_windows(shape, n_students, encoder.max_position, **draw)       # (S, T, n_dim)
        teacher = window(shape).to(students.device).unsqueeze(0)
        chosen = torch.randperm(students.size(1), **draw)[:n_samples]
        e = encoder(torch.cat([teacher, students])[:, chosen], check=False)             # (1 + S, m, C)
        loss = loss + distill_weight * distillation_loss(e[0], e[1:], encoder.n_head)
    return loss


# ------------------------------------------------------------------------------------------------------------
# 5. Position encodings: positions in, one Signal for each layer out (paper, sections 3.3 and 4)


@dataclass
class TransformerConfig:
    """What GPT and ViT have in common."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    pe: str = "seqpe"           # a key of ENCODINGS
    fusion: str = "scalar"      # how SeqPE's e_p enters the model, a key of FUSIONS
    n_digits: int = 4
    base: int = 10
    pe_width: Optional[int] = None      # of SeqPE's encoder, as wide as e_p unless given
    spread: float = 0.0         # of SeqPE's slopes at the start: 0 is 1 in every head, 8 as ALiBi's


@dataclass
class GPTConfig(TransformerConfig):
    block_size: int = 128       # the training length, in tokens; no limit of the model
    vocab_size: int = 256


@dataclass
class ViTConfig(TransformerConfig):
    image_size: int = 32        # the training size, in pixels; no limit of the model
    patch_size: int = 4
    n_channels: int = 1
    n_classes: int = 10


def resize_grid(values, resize, mode_2d="bilinear"):
    """Interpolate the values of a grid, (prod(old), C) -> (prod(new), C); resize is (old, new) or None.

    Coordinates grow evenly, which linear interpolation keeps; embeddings of a grid are resized bicubically.
    """
    if resize is None:
        return values
    old, new = resize
    mode = {1: "linear", 2: mode_2d, 3: "trilinear"}[len(old)]
    grid = values.T.unflatten(-1, old).unsqueeze(0)                                 # (1, C, *old)
    return F.interpolate(grid, size=new, mode=mode).flatten(2)[0].T


class PositionEncoding(nn.Module):
    """positions (..., T, n_dim) -> a list of n_layer Signals. This one is nope: it says nothing.

    window: the training window's shape. class_token: the model has one, which gets a row of its own in front.
    resize: (old, new), two shapes: what is made of positions, those of the old, is stretched to the new one.
    """
    max_position = None         # the hard limit, of encodings that have one

    def __init__(self, config, window, class_token=False):
        super().__init__()
        self.config, self.n_dim, self.class_token = config, len(window), class_token
        self.head_dim = config.n_embd // config.n_head

    def forward(self, positions, resize=None):
        return [Signal()] * self.config.n_layer


class RoPE(PositionEncoding):
    """Rotary encoding: the angle of a pair of channels is a weighted sum of the coordinates.

    rope (Su et al. 2021; axial in n-D): a pair looks at one coordinate, at a fixed frequency. rope_mixed (Heo
    et al. 2024): it looks at both coordinates of an image, at frequencies learned for each layer and head.
    """

    def __init__(self, config, window, class_token=False):
        super().__init__(config, window, class_token)
        if self.head_dim % (2 * self.n_dim):
            raise ValueError(f"rope in {self.n_dim}-D needs n_embd / n_head divisible by {2 * self.n_dim}, "
                             f"got {self.head_dim}")
        n = self.head_dim // 2 // self.n_dim
        theta = 10000.0 if self.n_dim == 1 else 100.0       # a grid has few rows, a text many characters
        magnitude = theta ** (-torch.arange(n) / n)         # (n,)
        if config.pe == "rope":     # (1, 1, n_dim, D/2): the same for all layers and heads
            self.register_buffer("frequency", torch.block_diag(*[magnitude[None]] * self.n_dim)[None, None])
            return
        if self.n_dim != 2:
            raise ValueError("rope_mixed is an encoding of images: it needs positions of 2 dimensions")
        angle = torch.rand(config.n_layer, config.n_head, 1) * 2 * math.pi
        angle = torch.cat([angle.expand(-1, -1, n), angle.expand(-1, -1, n) + math.pi / 2], dim=-1)
        self.frequency = nn.Parameter(magnitude.repeat(2) * torch.stack([angle.cos(), angle.sin()], dim=2))

    def forward(self, positions, resize=None):
        positions = resize_grid(positions.to(self.frequency.device).float(), resize)
        # A product and a sum, not a matrix product: autocast would round the angles to 8 bits.
        angle = (positions[..., None, None, :, :, None] * self.frequency.unsqueeze(-3)).sum(-2)
        angle = F.pad(angle, (0, 0, int(self.class_token), 0))   # (..., n_layer or 1, H or 1, T, D/2)
        rotate = torch.stack([angle.cos(), angle.sin()]).movedim(-4, 0)
        return [Signal(rotate=layer) for layer in rotate.expand(self.config.n_layer, *rotate.shape[1:])]


class ALiBi(PositionEncoding):
    """Press et al. 2022: the logit falls with distance, - slope_h * (i - j).

    Under a softmax -slope * i, the same for a whole row, cancels. That leaves slope * j, which is a dot
    product too. j is split in two, 256 * a + b, so that bfloat16 holds each part exactly.
    """

    def __init__(self, config, window, class_token=False):
        super().__init__(config, window, class_token)
        if self.n_dim != 1 or class_token:
            raise ValueError("alibi is an encoding of text: it has no form for images")
        slope = 2.0 ** (-8 * torch.arange(1, config.n_head + 1) / config.n_head)
        slope = slope * self.head_dim ** 0.5        # attention divides by it
        self.register_buffer("slope", slope.view(-1, 1, 1))

    def forward(self, positions, resize=None):
        positions = resize_grid(positions.to(self.slope.device).float(), resize)
        low = positions % 256
        j = torch.cat([positions - low, low], dim=-1).unsqueeze(-3)                 # (..., 1, T, 2)
        j = j.expand(*j.shape[:-3], len(self.slope), -1, -1)                        # (..., H, T, 2)
        return [Signal(extend=torch.stack([self.slope.expand_as(j), j]))] * self.config.n_layer


class LearnedTable(nn.Module):
    """A vector for each position of the training window, and none beyond it."""

    def __init__(self, shape, n_embd):
        super().__init__()
        self.shape, self.max_position = shape, max(shape)
        self.weight = nn.Parameter(torch.randn(*shape, n_embd) * 0.02)

    def forward(self, positions):
        if positions.numel() and (positions.min() < 0 or (positions >= torch.tensor(self.shape)).any()):
            lowest, highest = (tuple(end.tolist()) for end in positions.flatten(0, -2).aminmax(dim=0))
            raise ValueError(f"the learned table holds positions from 0 to below {self.shape}, "
                             f"got {lowest} to {highest}; interpolate=True stretches it")
        return self.weight[positions.unbind(-1)]


class Sinusoid(nn.Module):
    """Vaswani et al. 2017; with several dimensions each gets its share of the channels."""
    max_position = None

    def __init__(self, n_dim, n_embd):
        super().__init__()
        if n_embd % (2 * n_dim):
            raise ValueError(f"sinusoidal in {n_dim}-D needs n_embd divisible by {2 * n_dim}, got {n_embd}")
        n = n_embd // 2 // n_dim
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(n) / n))
        self.gain = nn.Parameter(torch.tensor(0.1))     # token embeddings start at 0.02: 1 would drown them

    def forward(self, positions):
        angle = positions.to(self.frequency.device).unsqueeze(-1) * self.frequency  # (..., n_dim, n)
        return self.gain * torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class EmbeddingPE(PositionEncoding):
    """Encodings that make a vector e_p of each position, and how it enters the model (paper, section 3.3):

        input   x_i + e_i, once, before the first layer
        scalar  q_i . k_j + eq_i . ek_j,        [eq, ek] = W e, one W for all layers (images: one for each)
        mul     q_i * eq_i and k_j * ek_j,      [eq, ek] = W e, a W for each layer
        add     q_i + eq_i and k_j + ek_j,      [eq, ek] = W e, a W for each layer
    """

    def __init__(self, config, window, class_token=False):
        super().__init__(config, window, class_token)
        C, n_head, n_layer = config.n_embd, config.n_head, config.n_layer
        self.fusion = config.fusion if config.pe == "seqpe" else "input"
        if self.fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {self.fusion!r}; known: {', '.join(FUSIONS)}")
        # Half of a head's channels for each coordinate are enough to say how near; attention pays for each.
        size = n_head * math.ceil(self.n_dim * self.head_dim / 2) if self.fusion == "scalar" else C
        if config.pe == "seqpe":
            self.embedding = SeqPE(size, n_head, n_dim=self.n_dim, n_digits=config.n_digits, base=config.base,
                                   width=config.pe_width, dropout=config.dropout)
        else:
            self.embedding = LearnedTable(window, C) if config.pe == "learned" else Sinusoid(self.n_dim, C)
        self.max_position = self.embedding.max_position
        if config.pe == "seqpe" and max(window) > self.max_position:
            raise ValueError(f"a window of shape {window} does not fit into 0 to {self.max_position - 1}")
        # The class token has no place in the grid: its vector is learned, and starts as large as the others.
        std = 1.0 if config.pe == "seqpe" else 0.02
        self.cls = nn.Parameter(torch.randn(size) * std) if class_token else None
        # The paper has one map for all layers on text, and on images one for each.
        n_maps = {"input": 0, "scalar": 1 if self.n_dim == 1 else n_layer}.get(self.fusion, n_layer)
        self.maps = nn.ModuleList(nn.Linear(size, 2 * size, bias=False) for _ in range(n_maps))
        # eq . ek / sqrt(D) starts as slope_h * e_i . e_j, which L_delta has made fall with distance. With
        # slopes of 1 all heads begin by looking nearby, with ALiBi's some begin by looking everywhere.
        slope = 2.0 ** (-config.spread * torch.arange(n_head) / n_head)
        start = (slope * self.head_dim ** 0.5).sqrt().repeat_interleave(size // n_head).diag()
        for W in self.maps:
            W.weight.data.copy_(start.repeat(2, 1))

    def forward(self, positions, resize=None):
        if positions.dim() == 3:    # sequences that share a window share its embeddings
            windows, which = positions.unique(dim=0, return_inverse=True)
            e = self.embedding(windows)[which]                                      # (B, T, C)
        else:
            e = self.embedding(positions)                                           # (T, C)
        e = resize_grid(e, resize, mode_2d="bicubic")
        if self.cls is not None:
            e = torch.cat([self.cls.expand(*e.shape[:-2], 1, -1), e], dim=-2)
        n_layer, n_head = self.config.n_layer, self.config.n_head
        if self.fusion == "input":
            return [Signal(input=e)] + [Signal()] * (n_layer - 1)
        heads = [W(e).unflatten(-1, (2, n_head, -1)).movedim(-3, 0).transpose(-3, -2) for W in self.maps]
        return [Signal(**{FUSIONS[self.fusion]: each}) for each in heads] * (n_layer // len(heads))


FUSIONS = {"scalar": "extend", "mul": "mul", "add": "add", "input": "input"}    # the channel each one uses
ENCODINGS = {"seqpe": EmbeddingPE, "rope": RoPE, "rope_mixed": RoPE, "alibi": ALiBi, "learned": EmbeddingPE,
             "sinusoidal": EmbeddingPE, "nope": PositionEncoding}


# ------------------------------------------------------------------------------------------------------------
# 6. Models


class Transformer(nn.Module):
    """A stack of blocks with a position encoding: what GPT and ViT have in common."""

    def __init__(self, config, window, causal):
        super().__init__()
        _at_least_one(**{name: value for name, value in vars(config).items()
                         if isinstance(value, int) and name not in ("dropout", "spread")})
        if config.pe not in ENCODINGS:
            raise ValueError(f"unknown position encoding {config.pe!r}; known: {', '.join(ENCODINGS)}")
        self.config, self.window = config, window       # the training window's shape
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.n_embd, config.n_head, causal, config.dropout)
                                    for _ in range(config.n_layer))
        self.ln = nn.LayerNorm(config.n_embd)
        self.apply(_init_weights)
        for block in self.blocks:       # GPT-2: the residual stream's variance does not grow with depth
            for layer in (block.attn.proj, block.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.n_layer))
        self.pe = ENCODINGS[config.pe](config, window, class_token=not causal)     # has a start of its own

    @property
    def encoder(self):
        """The SeqPE inside, or None."""
        return self.pe.embedding if self.config.pe == "seqpe" else None

    def transform(self, x, signals, caches=None):
        """Token embeddings x (B, T, C) through all the blocks."""
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, signals[i], caches[i] if caches else None)
        return self.ln(x)

    def position_signals(self, shape, positions=None, interpolate=False):
        """The signals of the window of this shape, or of given positions: (T, n_dim) or (B, T, n_dim)."""
        if positions is None and interpolate and shape != self.window:
            return self.pe(window(self.window), resize=(self.window, shape))
        return self.pe(window(shape) if positions is None else positions)

    def configure_optimizers(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95)):
        """AdamW, in which only matrices decay. A group's "of_seqpe": whether it is of SeqPE or its maps."""
        seqpe = set(self.pe.parameters()) if self.encoder else set()
        groups = {}
        for p in self.parameters():
            groups.setdefault((p in seqpe, p.dim() >= 2), []).append(p)
        groups = [dict(params=group, of_seqpe=of_seqpe, weight_decay=weight_decay if is_matrix else 0.0)
                  for (of_seqpe, is_matrix), group in groups.items()]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


class GPT(Transformer):
    """A language model in the manner of nanoGPT, with any of the encodings above."""

    def __init__(self, config):
        super().__init__(config, (config.block_size,), causal=True)
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.tokens.weight, std=0.02)       # also the output layer's weights

    def forward(self, idx, targets=None, positions=None, interpolate=False):
        """idx: (B, T) tokens -> logits (B, T, vocab_size) and, with targets (B, T), the mean loss in nats.

        positions: (T,) or (B, T), default 0 to T - 1. interpolate: stretch those of the training window over
        T instead of going beyond it. Targets of -1 do not count.
        """
        if positions is not None:
            positions = positions.unsqueeze(-1)
        signals = self.position_signals(idx.shape[1:], positions, interpolate)
        logits = F.linear(self.transform(self.tokens(idx), signals), self.tokens.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, generator=None):
        """Continue idx (B, T) -> (B, T + max_new_tokens); temperature 0 takes the likeliest token.

        The cache keeps every layer's keys and values, so each position is encoded and each token seen once.
        """
        if idx.size(1) == 0:
            raise ValueError("generation needs at least one token to start from")
        signals = self.pe(window((idx.size(1) + max_new_tokens - 1,)))
        caches = [{} for _ in self.blocks] if use_cache else None
        seen = 0
        for _ in range(max_new_tokens):
            T = idx.size(1)
            x = self.transform(self.tokens(idx[:, seen:]), [s.at(slice(seen, T)) for s in signals], caches)
            seen = T if use_cache else 0
            logits = F.linear(x[:, -1], self.tokens.weight).float()
            if top_k is not None:
                kept = logits.topk(min(top_k, logits.size(-1))).values
                logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, token], dim=1)
        return idx


class ViT(Transformer):
    """An image classifier (Dosovitskiy et al. 2021) of the same blocks, for images of any size."""

    def __init__(self, config):
        C, patch = config.n_embd, config.patch_size
        _at_least_one(image_size=config.image_size, patch_size=patch)
        if config.image_size % patch:
            raise ValueError(f"image_size={config.image_size} is not divisible by patch_size={patch}")
        super().__init__(config, (config.image_size // patch,) * 2, causal=False)
        self.patches = nn.Conv2d(config.n_channels, C, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(C) * 0.02)
        self.head = nn.Linear(C, config.n_classes)
        _init_weights(self.head)

    def forward(self, images, targets=None, positions=None, interpolate=False, kept=None):
        """images: (B, n_channels, height, width) -> logits (B, n_classes) and, with targets (B,), the loss.

        positions: of the patches, (T, 2) or (B, T, 2), default a grid from (0, 0). interpolate: stretch those
        of the training grid over a larger one instead of going beyond it. kept: (n,) indices of the patches
        to look at, default all T.
        """
        patch = self.config.patch_size
        if images.size(-2) % patch or images.size(-1) % patch:
            raise ValueError(f"an image of {tuple(images.shape[-2:])} is not divisible by patch_size={patch}")
        x = self.patches(images)                                                    # (B, C, h, w)
        signals = self.position_signals(x.shape[-2:], positions, interpolate)
        x = torch.cat([self.cls.expand(x.size(0), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        if kept is not None:
            rows = F.pad(kept + 1, (1, 0))      # the class token stays
            x, signals = x[:, rows], [s.at(rows) for s in signals]
        logits = self.head(self.transform(x, signals)[:, 0])
        return logits, None if targets is None else F.cross_entropy(logits, targets)

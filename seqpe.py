"""SeqPE: Transformer with Sequential Position Encoding (Li et al., arXiv 2506.13277). MIT licence.

A position is a number, and a number can be written down: with two digits for each, (2, 13) is 0 2 1 3. In SeqPE
a small transformer reads these digits and returns e_p, a vector that says where that is. It can read positions
that the model was never trained at, and two extra losses keep those in order. In this file, from top to bottom:

    1. Positions as digits      position_to_digits, digits_to_position, window
    2. The transformer block    Signal, attend, Attention, Block: the same for encoder, GPT and ViT
    3. The sequential encoder   SeqPE: digits -> e_p
    4. The two extra losses     sample_hard_negatives, sample_groups, contrastive_loss: L_delta;
                                distillation_loss: L_OOD; position_regularizers: both, as a step adds them;
                                pretrain_encoder; start shifting: place_windows, count_bias
    5. Position encodings       seqpe and what it is compared with, behind one small interface
    6. The model                GPT, in the manner of nanoGPT

What is not the paper's is marked "ours:". SeqPE(...) is the paper's by default; its dropout of 0.1 is a setting
of the training. The functions of section 4 do ours by default, and the paper's with paper=True.

To copy: sections 1 to 4 stand alone and need only torch. The README shows how to use them in your own model.

Shapes: B sequences of T positions, C the model's width, H heads of D = C / H channels, E the size of e_p.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------
# 1. Positions as digits


def position_to_digits(positions, n_digits, base=10):
    """Write positions in `base`, most significant digit first, padded with zeros: (2, 13) -> 0 2 1 3.

    positions: (..., n_dim) integers from 0 to base ** n_digits - 1 -> (..., K) digits, K = n_dim * n_digits.
    """
    digits = positions.unsqueeze(-1) // _place_values(n_digits, base, positions.device)
    # The leading digit keeps what is past the limit: no table has a row for it, so it is an error there.
    digits[..., 1:] %= base
    return digits.flatten(-2)


def digits_to_position(digits, n_digits, base=10):
    """The inverse of position_to_digits: (..., n_dim * n_digits) digits -> (..., n_dim) positions."""
    return (digits.unflatten(-1, (-1, n_digits)) * _place_values(n_digits, base, digits.device)).sum(-1)


def _place_values(n_digits, base, device):
    return base ** torch.arange(n_digits - 1, -1, -1, device=device)    # (n_digits,): ..., 100, 10, 1


def window(shape):
    """All positions of a box, row by row: shape (T,) for text, (h, w) for images, ... -> (T, n_dim)."""
    return torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape))


# ------------------------------------------------------------------------------------------------------------
# 2. The transformer block, and how any position encoding meets attention


class Signal(NamedTuple):
    """What a position encoding tells one layer. The fields are applied in this order; None does nothing.

    A leading 2 is (for queries, for keys), in rotate (cos, sin). Where all sequences of a batch have the same
    positions, B is left out; H may be 1.
    """
    input: Optional[Tensor] = None   # (B, T, C)          x_i + input_i
    mul: Optional[Tensor] = None     # (2, B, H, T, D)    q_i * mul_i, k_j * mul_j
    add: Optional[Tensor] = None     # (2, B, H, T, D)    q_i + add_i, k_j + add_j
    rotate: Optional[Tensor] = None  # (2, B, H, T, D/2)  q_i and k_j turned by an angle
    extend: Optional[Tensor] = None  # (2, B, H, T, E/H)  q_i . k_j + extend_i . extend_j
    bias: Optional[Tensor] = None    # (B, H, T, T)       logit_ij + bias_ij; a matrix: for short texts only


def _rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by an angle each, as RoPE does."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.device), sin.to(x.device)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def attend(q, k, v, eq=None, ek=None, mask=None, causal=True):
    """F.scaled_dot_product_attention with positions: the logits are (q_i . k_j + eq_i . ek_j) / sqrt(D).

    q: (B, H, T, D), eq: (..., H, T, E/H), for T queries; k, v, ek: the same for S keys -> (B, H, T, D). Keys may
    have fewer heads, each for a group of queries' heads. causal: a query sees the keys up to its own, where
    the queries are those of the last T keys, as with a KV cache. mask: (..., T, S), numbers to add to the
    logits, or booleans that are True where the key is seen.
    """
    D, T, S = q.size(-1), q.size(-2), k.size(-2)
    if eq is not None:
        # The sum of two dot products is that of concatenated vectors: no (T, S) matrix is ever built.
        q = torch.cat([q, eq.expand(*q.shape[:-1], -1).type_as(q)], dim=-1)            # (B, H, T, D + E/H)
        k = torch.cat([k, ek.expand(*k.shape[:-1], -1).type_as(k)], dim=-1)
        v = F.pad(v, (0, k.size(-1) - D))               # the fused CPU kernel wants v as wide as q and k
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
        mask = mask.type_as(q)
    if causal and (mask is not None or T != S):
        future = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(1 + S - T)
        mask, causal = future if mask is None else mask + future, False
    # The scale stays that of the content: what is appended to q and k does not make its logits smaller.
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=D ** -0.5,
                                       enable_gqa=q.size(1) != k.size(1))
    return y[..., :D]


class Attention(nn.Module):
    """Multi-head self-attention, and the only place that knows what a signal does to queries and keys."""

    def __init__(self, n_embd, n_head, causal=True, dropout=0.0):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.query = nn.Linear(n_embd, n_embd)
        self.key_value = nn.Linear(n_embd, 2 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, signal=Signal(), last_only=False):
        """x: (B, T, C) -> (B, T, C), or (B, 1, C) where only the last token asks; it sees all, masked or not."""
        q = self.query(x[:, -1:] if last_only else x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k, v = self.key_value(x).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)    # (B, H, T, D)

        if signal.mul is not None:
            q, k = q * signal.mul[0].type_as(q), k * signal.mul[1].type_as(k)
        if signal.add is not None:
            q, k = q + signal.add[0].type_as(q), k + signal.add[1].type_as(k)
        if signal.rotate is not None:
            q, k = _rotate(q, *signal.rotate), _rotate(k, *signal.rotate)
        eq, ek = (None, None) if signal.extend is None else signal.extend
        y = attend(q, k, v, eq, ek, signal.bias, self.causal and not last_only)                # (B, H, T, D)
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A pre-norm transformer layer (GPT-2's), for the encoder, GPT and ViT alike.

    approximate: of GELU, as torch calls it. "tanh" is GPT-2's, which SeqPE's encoder uses. ours: in the model
    "none", the exact one, which is faster on a CPU.
    """

    def __init__(self, n_embd, n_head, causal=True, dropout=0.0, approximate="none"):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd={n_embd} is not divisible by n_head={n_head}")
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, causal, dropout)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(approximate),
                                 nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout))

    def forward(self, x, signal=Signal(), last_only=False):
        if signal.input is not None:
            x = x + signal.input.type_as(x)
        x = (x[:, -1:] if last_only else x) + self.attn(self.ln_1(x), signal, last_only)
        return x + self.mlp(self.ln_2(x))


def _init_weights(module):
    """GPT-2's initialisation."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()


# ------------------------------------------------------------------------------------------------------------
# 3. The sequential encoder


class SeqPE(nn.Module):
    """Reads the digits of a position and returns its embedding e_p, of size n_embd.

    n_head: of the encoder, and of the attention that e_p is meant for (ours: one number for both). n_dim:
    coordinates of a position, each from 0 to below max_position, in as many digits as that takes in `base`.
    max_position: the paper's 20,000 is for text; say little more than you will ever read, as all of them have
    to be kept in order. width: of the encoder, if not n_embd; 64 to 96 is plenty in a wide model. head_norm:
    the length that e_p then has in each head. dropout: the paper trains with 0.1.
    """

    def __init__(self, n_embd, n_head=4, n_layer=2, n_dim=1, base=10, max_position=20_000, width=None,
                 dropout=0.0, head_norm=None):
        super().__init__()
        width = width or n_embd
        if min(n_embd, n_head, n_layer, n_dim, width, max_position - 1, base - 1) < 1 or max_position > 2 ** 30:
            raise ValueError("SeqPE: sizes are at least 1, base at least 2, max_position from 2 to 2 ** 30")
        n_digits = next(n for n in range(1, 31) if base ** n >= max_position)
        if n_embd % n_head or width % n_head or head_norm and n_embd == n_head:
            raise ValueError(f"SeqPE: n_embd={n_embd}, width={width} must be divisible by n_head={n_head}; "
                             "with head_norm, a head must have more than one channel")
        self.n_embd, self.n_head, self.n_dim, self.n_digits, self.base = n_embd, n_head, n_dim, n_digits, base
        self.max_position, self.head_norm = max_position, head_norm
        self.symbol = nn.Embedding(base, width)         # which digit
        self.place = nn.Embedding(n_digits, width)      # at which place of its number
        self.dimension = nn.Embedding(n_dim, width) if n_dim > 1 else None      # of which coordinate
        self.cls = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(width, n_head, True, dropout, "tanh") for _ in range(n_layer))
        self.ln = nn.LayerNorm(width)
        self.proj = nn.Linear(width, n_embd)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw all weights anew: for after a host model's own initialisation, or one on the meta device."""
        self.apply(_init_weights)
        nn.init.normal_(self.cls, std=0.02)

    def forward(self, positions, check=True):
        """positions: (..., n_dim) integers -> e_p: (..., n_embd).

        ValueError for what is no position. check=False does not look at their values: for positions on a GPU,
        which the host would wait for, and for torch.compile and torch.export.
        """
        if positions.dim() == 0 or positions.size(-1) != self.n_dim:
            raise ValueError(f"positions must be (..., n_dim={self.n_dim}), got {tuple(positions.shape)}")
        if check and positions.numel():
            lowest, highest = int(positions.min()), int(positions.max())
            if lowest < 0 or highest >= self.max_position:
                raise ValueError(f"positions {lowest} to {highest} are past the limit: this SeqPE holds 0 to "
                                 f"{self.max_position - 1}; make it with max_position={highest + 1} or more")
        digits = position_to_digits(positions, self.n_digits, self.base).to(self.cls.device)        # (..., K)
        # A symbol is embedded as the sum of what it is, its place and its dimension.
        x = self.symbol(digits.reshape(-1, self.n_dim, self.n_digits)) + self.place.weight
        if self.dimension is not None:
            x = x + self.dimension.weight.unsqueeze(1)      # (n, n_dim, n_digits, width), n positions
        # Attention is causal, as in a language model: so [CLS] stands last, where it sees all digits.
        x = torch.cat([x.flatten(1, 2), self.cls.expand(x.size(0), 1, -1)], dim=1)      # (n, K + 1, width)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, last_only=True)              # only [CLS] is read, so only [CLS] asks
        e = self.proj(self.ln(x[:, 0]))
        if self.head_norm:
            # ours: the same length in each head, so that a dot product says how near, and nothing else.
            e = self.head_norm * F.normalize(e.unflatten(-1, (self.n_head, -1)), dim=-1)
        return e.reshape(*digits.shape[:-1], self.n_embd)


# ------------------------------------------------------------------------------------------------------------
# 4. The two regularisers, and start shifting


def sample_hard_negatives(encoder, pivots, n_samples):
    """Positions written much like the pivot: (P, n_dim) -> (P, n_samples, n_dim).

    1 to 3 random edits of its K digits. An edit inserts a digit (the leading one drops out), deletes one (a
    zero moves in at the front), swaps two neighbours or replaces one, so every result can be written. The
    digits are one row: what moves may cross from one coordinate to the next.
    """
    digits = position_to_digits(pivots, encoder.n_digits, encoder.base).unsqueeze(1).repeat(1, n_samples, 1)
    K, device = digits.size(-1), pivots.device
    keep, new, zero = list(range(K)), [K], [K + 1]          # which of its K digits, a new one, a zero
    edits = torch.tensor([[keep[1:at + 1] + new + keep[at + 1:],                    # insert
                           zero + keep[:at] + keep[at + 1:],                        # delete
                           keep[:at] + keep[at:at + 2][::-1] + keep[at + 2:],       # swap
                           keep[:at] + new + keep[at + 1:]] for at in keep], device=device)     # replace

    def draw(high):
        return torch.randint(high, (*digits.shape[:-1], 1), device=device)

    n_edits = draw(3)
    for i in range(3):
        which, at = draw(4).squeeze(-1), draw(K).squeeze(-1)
        choices = F.pad(torch.cat([digits, draw(encoder.base)], dim=-1), (0, 1))    # (P, n_samples, K + 2)
        edited = choices.gather(-1, edits[at, which])                               # (P, n_samples, K)
        digits = torch.where(i <= n_edits, edited, digits)
    return digits_to_position(digits, encoder.n_digits, encoder.base)


def sample_groups(encoder, n_groups, n_candidates, paper=False):
    """Groups of positions to compare, a pivot and its M candidates: (P, N = 1 + M, n_dim), the pivot first.

    They are drawn in one of three ways: uniformly from all positions; so, with a fifth replaced by hard
    negatives; uniformly from a short window, so that close numbers must be told apart. One that is the pivot
    moves on by one. The paper's shares are 0.5, 0.3, 0.2, and its window has 256 positions. ours: 0.2, 0.1,
    0.7 and a window whose size is random on a logarithmic scale, small ones the likeliest: the nearest of 32
    candidates out of thousands is dozens away, and copying the character before takes a distance of one.
    """
    n_dim, max_position = encoder.n_dim, encoder.max_position
    kwargs = dict(device=encoder.cls.device)
    pivots = torch.randint(max_position, (n_groups, 1, n_dim), **kwargs)
    candidates = torch.randint(max_position, (n_groups, n_candidates, n_dim), **kwargs)

    n_hard = n_candidates // 5
    hard = sample_hard_negatives(encoder, pivots.squeeze(1), n_hard)
    hard = torch.where(hard < max_position, hard, candidates[:, :n_hard])
    hard = torch.cat([hard, candidates[:, n_hard:]], dim=1)

    smallest, scale = min(4, max_position), torch.rand(n_groups, 1, 1, **kwargs).square()
    size = (smallest * (max_position / smallest) ** scale).long()
    if paper:
        size = torch.full_like(size, min(256, max_position))
    start = pivots - (torch.rand(pivots.shape, **kwargs) * size).long()
    start = start.clamp(min=0).minimum(max_position - size)
    close = (start + (torch.rand(candidates.shape, **kwargs) * size).long()).clamp(max=max_position - 1)

    mix = (0.5, 0.3) if paper else (0.2, 0.1)
    way = torch.rand(n_groups, 1, 1, **kwargs)
    candidates = torch.where(way < mix[0], candidates, torch.where(way < sum(mix), hard, close))
    hit = (candidates == pivots).all(-1)
    candidates[..., -1] = (candidates[..., -1] + hit.long()) % max_position
    return torch.cat([pivots, candidates], dim=1)


def contrastive_loss(e, positions, n_head=1, n_pivots=1):
    """L_delta: near positions get similar embeddings. The nearest of a pivot's candidates has to be found:

        L_delta = mean over pivots i of  - log( exp(e_i . e_c) / sum_j exp(e_i . e_j) )

    c is the position nearest to i in the group, j runs over all others but i. e: (P, N, C) embeddings of P
    groups of positions (P, N, n_dim) -> scalar. The paper compares whole vectors, and the first position of a
    group, the pivot, with the others. ours: each head is compared by itself (n_head), as attention will, and
    each position takes its turn as the pivot (n_pivots=N): N times the comparisons for the same embeddings.
    Copies of i and of c do not count, nor (ours) do others exactly as near as c.
    """
    pivots, others = positions[:, :n_pivots].unsqueeze(2), positions.unsqueeze(1)
    same = (pivots == others).all(-1)                                               # (P, n_pivots, N)
    distance = (pivots - others).pow(2).sum(-1).masked_fill(same, torch.iinfo(torch.int64).max)
    least, nearest = distance.min(-1, keepdim=True)                                 # (P, n_pivots, 1)
    ties = (distance == least).scatter(-1, nearest, False)
    e = e.unflatten(-1, (n_head, -1)).transpose(1, 2)                               # (P, H, N, E)
    logits = e[:, :, :n_pivots] @ e.transpose(-2, -1)                               # (P, H, n_pivots, N)
    logits = logits.masked_fill((same | ties).unsqueeze(1), -math.inf)
    return F.cross_entropy(logits.flatten(0, 2), nearest.transpose(1, 2).expand(-1, n_head, -1).flatten())


def distillation_loss(e_teacher, e_students, n_head):
    """L_OOD: a window far away gets the inner geometry of the training window, its teacher.

        t_ij = softmax over j of e_i . e_j  for the teacher's positions, s_ij for a student's, i and j in 1..m
        L_OOD = mean over rows i of  sum_j (t_ij - s_ij) (log t_ij - log s_ij)  =  KL(t_i, s_i) + KL(s_i, t_i)

    j = i is among them. e_teacher: (m, C), which receives no gradient; e_students: (S, m, C) -> scalar, the
    mean over students and heads, too. The authors' code averages over all elements, m times less: that is
    their weight of 0.1 / m here.
    """
    def log_rows(e):
        e = e.unflatten(-1, (n_head, -1)).transpose(-3, -2)     # (..., H, m, E)
        return F.log_softmax(e @ e.transpose(-2, -1), dim=-1)   # (..., H, m, m)

    teacher, students = log_rows(e_teacher.detach()), log_rows(e_students)
    return ((teacher.exp() - students.exp()) * (teacher - students)).sum(-1).mean()


def place_windows(shape, n_windows, max_position, max_pieces=4, device=None):
    """Start shifting: the training window at random places -> positions (n_windows, T, n_dim).

    shape: the training window, (T,) or (h, w). The paper moves windows as a whole (max_pieces=1). ours: each
    axis is cut at random into up to max_pieces pieces that keep their order but lie further apart, so that a
    short window has long distances in it (as in PoSE, Zhu et al. 2024).
    """
    places = window(shape).to(device)                                                   # (T, n_dim)
    if max(shape) > max_position:
        raise ValueError(f"a window of shape {tuple(shape)} does not fit into 0 to {max_position - 1}")
    kwargs = dict(device=device)
    n_pieces = torch.randint(1, max_pieces + 1, (n_windows, 1, 1), **kwargs)
    unused = torch.arange(max_pieces, device=device).view(-1, 1) >= n_pieces  # (n_windows, max_pieces, 1)
    offsets = torch.stack([torch.randint(max_position - size + 1, (n_windows, max_pieces), **kwargs)
                           for size in shape], dim=-1)                      # (n_windows, max_pieces, n_dim)
    offsets = offsets.masked_fill(unused, max_position).sort(1).values
    cuts = torch.rand(n_windows, max_pieces - 1, len(shape), **kwargs) * torch.tensor(shape, device=device)
    cuts = cuts.masked_fill(unused[:, 1:], math.inf).unsqueeze(1)
    piece = (places.unsqueeze(1) >= cuts).sum(2)        # cuts before each place: (n_windows, T, n_dim)
    return places + offsets.gather(1, piece)


def count_bias(positions):
    """ours: what the keys of a torn window count for: positions (B, T, 1) -> (B, 1, T, T), a bias of logits.

    A piece of n positions whose next piece starts `span` positions further on is a sample of span keys, which
    a long text would all have. So for queries of later pieces its keys count span / n times, as in sampled
    softmax: the logarithm is added to their logits. Without it, heads that look far only ever met T keys, and
    drown among more. Counted in full, a single key that is looked for would be louder than in a long text: so
    each window stands for one of another length, with log(span / n) times a random number from 0 to 1.
    """
    positions = positions.squeeze(-1)
    gap = F.pad(positions.diff() - 1, (0, 1))               # (B, T): positions left out behind each one
    piece = F.pad(gap[:, :-1] > 0, (1, 0)).cumsum(-1)       # (B, T): the number of its piece
    same = piece.unsqueeze(-1) == piece.unsqueeze(-2)                                   # (B, T, T)
    count = 1 + (same * gap.unsqueeze(-2)).sum(-1) / same.sum(-1)                       # (B, T): span / n
    log_count = count.log() * torch.rand(len(gap), 1, device=gap.device)
    return log_count.unsqueeze(-2).masked_fill(same, 0.0).unsqueeze(1)


def position_regularizers(encoder, shape, contrastive_weight=0.1, distill_weight=0.1, n_groups=4,
                          n_candidates=32, n_students=4, n_samples=32, paper=False):
    """contrastive_weight * L_delta + distill_weight * L_OOD, a scalar: what a step adds to the model's loss.

    encoder: a SeqPE; shape: the training window, (T,) or (h, w). paper: draw groups and compare them as the
    paper does; it has 16 to 32 of them. generator: on the encoder's device.
    """
    device = encoder.cls.device
    teacher = window(shape).to(device)                                                  # (T, n_dim)
    if len(shape) != encoder.n_dim:
        raise ValueError(f"a window of shape {tuple(shape)} is not of the encoder's n_dim={encoder.n_dim}")
    loss = torch.zeros((), device=device)
    if contrastive_weight:
        groups = sample_groups(encoder, n_groups, n_candidates, paper)
        e = encoder(groups, check=False)
        n_head, n_pivots = (1, 1) if paper else (encoder.n_head, groups.size(1))
        loss = loss + contrastive_weight * contrastive_loss(e, groups, n_head, n_pivots)
    if distill_weight:
        students = place_windows(shape, n_students, encoder.max_position, 1, device)
        chosen = torch.randperm(len(teacher), device=device)[:n_samples]
        windows = torch.cat([teacher.unsqueeze(0), students])                           # (1 + S, T, n_dim)
        e = encoder(windows[:, chosen], check=False)                                    # (1 + S, m, C)
        loss = loss + distill_weight * distillation_loss(e[0], e[1:], encoder.n_head)
    return loss


def pretrain_encoder(encoder, shape, steps=1000, learning_rate=2e-3, progress=iter):
    """ours: order the space of positions before the model's first step, as a short training has no time to.

    The regularisers alone, in place: L_delta at full weight, since there is nothing to disturb yet, and four
    times the groups. Call it before DistributedDataParallel wraps the model: replicas would drift apart.
    """
    optimizer = torch.optim.AdamW(encoder.parameters(), betas=(0.9, 0.95))
    for step in progress(range(steps)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        position_regularizers(encoder, shape, 1.0, n_groups=16).backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------------
# 5. Position encodings: positions in, one Signal for each layer out


@dataclass
class TransformerConfig:
    """What GPT and train_vit.py's ViT have in common."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    pe: str = "seqpe"           # a key of ENCODINGS; what follows is for SeqPE alone
    fusion: str = "scalar"      # how its e_p enters the model, a key of FUSIONS
    max_position: int = 2048    # these as SeqPE has them
    base: int = 10
    pe_dropout: float = 0.0
    head_norm: Optional[float] = None
    pe_embd: Optional[int] = None       # size of e_p, n_embd if not given; for the fusion "scalar" alone
    diagonal_maps: bool = False         # how the maps W start: N(0, 0.02), or diagonal (see EmbeddingPE)


@dataclass
class GPTConfig(TransformerConfig):
    block_size: int = 128       # the training length, in tokens; no limit of the model
    vocab_size: int = 256


class PositionEncoding(nn.Module):
    """positions (T, n_dim) or (B, T, n_dim) -> a list of n_layer Signals. This one is nope: it says nothing.

    shape: the training window's. class_token: the model has one, which gets a row of its own in front.
    """
    max_position = None         # the hard limit, of encodings that have one

    def __init__(self, config, shape, class_token=False):
        super().__init__()
        self.config, self.shape, self.n_dim, self.class_token = config, shape, len(shape), class_token
        self.head_dim = config.n_embd // config.n_head

    def forward(self, positions):
        if positions.dim() not in (2, 3) or positions.size(-1) != self.n_dim:
            raise ValueError(f"positions must be (T, {self.n_dim}) or (B, T, {self.n_dim}), "
                             f"got {tuple(positions.shape)}")
        return self.signals(positions)

    def signals(self, positions):
        return [Signal()] * self.config.n_layer

    def interpolate(self, shape):
        """The signals of a larger window: not further positions, but the training window's, stretched.

        Position i of the larger one is as far along in the smaller: a fraction, at the border past its end.
        """
        return self((window(shape).float() + 0.5) * torch.tensor(self.shape) / torch.tensor(shape) - 0.5)


class RoPE(PositionEncoding):
    """Rotary encoding (Su et al. 2021): a pair of channels is turned by an angle, position times frequency.

    Axial in n-D: each coordinate has its share of the pairs.
    """

    def __init__(self, config, shape, class_token=False):
        super().__init__(config, shape, class_token)
        if self.head_dim % (2 * self.n_dim):
            raise ValueError(f"rope in {self.n_dim}-D needs n_embd / n_head divisible by {2 * self.n_dim}, "
                             f"got {self.head_dim}")

    def magnitude(self, device=None):
        """The frequencies of a coordinate, in float32 whatever the model's type: angles need all of it."""
        n_pairs = self.head_dim // 2 // self.n_dim
        theta = 10000.0 if self.n_dim == 1 else 100.0       # a grid has few rows, a text many characters
        return theta ** (-torch.arange(n_pairs, dtype=torch.float32, device=device) / n_pairs)

    def frequency(self, device):
        """What each coordinate is multiplied by: (n_layer or 1, H or 1, n_dim, D/2)."""
        return torch.block_diag(*[self.magnitude(device)[None]] * self.n_dim)[None, None]

    def signals(self, positions):
        frequency = self.frequency(positions.device)
        positions = positions.to(frequency.device, torch.float32)
        # A product and a sum, not a matrix product: autocast would round the angles to 8 bits.
        angle = (positions[..., None, None, :, :, None] * frequency.unsqueeze(-3)).sum(-2)
        angle = F.pad(angle, (0, 0, int(self.class_token), 0))      # (..., n_layer or 1, H or 1, T, D/2)
        rotate = torch.stack([angle.cos(), angle.sin()]).movedim(-4, 0)
        return [Signal(rotate=layer) for layer in rotate.expand(self.config.n_layer, *rotate.shape[1:])]


class ALiBi(PositionEncoding):
    """Press et al. 2022: the logit falls with distance, - slope_h * (i - j).

    Under a softmax -slope * i, the same for a whole row, cancels. That leaves slope * j, which is a dot
    product too. j is split in two, 256 * a + b, so that bfloat16 holds each part exactly.
    """

    def __init__(self, config, shape, class_token=False):
        super().__init__(config, shape, class_token)
        if self.n_dim != 1 or class_token:
            raise ValueError("alibi is an encoding of text: it has no form for images")

    def signals(self, positions):
        head = torch.arange(1, self.config.n_head + 1, dtype=torch.float32, device=positions.device)
        slope = 2.0 ** (-8 * head / len(head)) * self.head_dim ** 0.5           # attention divides by it
        low = positions.float() % 256
        j = torch.cat([positions - low, low], dim=-1).unsqueeze(-3)                 # (..., 1, T, 2)
        j = j.expand(*j.shape[:-3], len(slope), -1, -1)                             # (..., H, T, 2)
        return [Signal(extend=torch.stack([slope.view(-1, 1, 1).expand_as(j), j]))] * self.config.n_layer


class LearnedTable(nn.Module):
    """A vector for each position of the training window, and none beyond it: an IndexError there."""

    def __init__(self, shape, n_embd):
        super().__init__()
        self.max_position = max(shape)
        self.weight = nn.Parameter(torch.randn(*shape, n_embd) * 0.02)

    def forward(self, positions):
        # What is negative would count from the end: it is moved past it.
        sizes = zip(positions.unbind(-1), self.weight.shape)
        return self.weight[tuple(torch.where(each < 0, size, each) for each, size in sizes)]


class Sinusoid(nn.Module):
    """Vaswani et al. 2017; with several dimensions each gets its share of the channels."""
    max_position = None

    def __init__(self, n_dim, n_embd):
        super().__init__()
        if n_embd % (2 * n_dim):
            raise ValueError(f"sinusoidal in {n_dim}-D needs n_embd divisible by {2 * n_dim}, got {n_embd}")
        self.n_pairs = n_embd // 2 // n_dim
        self.gain = nn.Parameter(torch.tensor(0.1))     # ours: tokens start at 0.02, a gain of 1 drowns them

    def forward(self, positions):
        pair = torch.arange(self.n_pairs, dtype=torch.float32, device=self.gain.device)
        angle = positions.to(pair.device).unsqueeze(-1) * 10000.0 ** (-pair / self.n_pairs)     # (..., n_dim, n)
        return self.gain * torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class EmbeddingPE(PositionEncoding):
    """Encodings that make a vector e_p of each position, and how it enters the model:

        input   x_i + input_gain * e_i, once, before the first layer
        scalar  q_i . k_j + eq_i . ek_j,        [eq, ek] = W e, one W for all layers (images: one for each)
        mul     q_i * eq_i and k_j * ek_j,      [eq, ek] = W e, a W for each layer
        add     q_i + eq_i and k_j + ek_j,      [eq, ek] = W e, a W for each layer

    The paper has scalar for text and mul for images, and W starts at random, N(0, 0.02). ours: diagonal_maps.
    W is diagonal at first, such that eq . ek / sqrt(D) is gain * e_i . e_j, which L_delta has already made
    large nearby and falling with distance. The gain is 1 in the first head and 1/64 in the last of four: some
    heads begin by looking nearby, some everywhere. Under mul W starts as the identity.
    """

    def __init__(self, config, shape, class_token=False):
        super().__init__(config, shape, class_token)
        C, n_layer, is_seqpe = config.n_embd, config.n_layer, config.pe == "seqpe"
        self.fusion = config.fusion if is_seqpe else "input"
        # ours: half a head's channels are enough to say how near, and attention pays for each (pe_embd).
        size = self.fusion == "scalar" and config.pe_embd or C
        if is_seqpe:
            self.embedding = SeqPE(size, config.n_head, n_dim=self.n_dim, base=config.base,
                                   max_position=config.max_position, dropout=config.pe_dropout,
                                   head_norm=config.head_norm)
        else:
            self.embedding = LearnedTable(shape, C) if config.pe == "learned" else Sinusoid(self.n_dim, C)
        self.max_position = self.embedding.max_position
        # The class token has no place in the grid: its vector is learned, and starts as large as the others.
        std = 1.0 if is_seqpe and config.head_norm else 0.02
        self.cls = nn.Parameter(torch.randn(size) * std) if class_token else None
        # ours: a gain as Sinusoid has; SeqPE's e_p starts at 1, and a text's tokens stayed unread beside it.
        self.input_gain = nn.Parameter(torch.tensor(0.1)) if is_seqpe and self.fusion == "input" else 1.0
        n_maps = {"input": 0, "scalar": 1 if self.n_dim == 1 else n_layer}.get(self.fusion, n_layer)
        self.maps = nn.ModuleList(nn.Linear(size, 2 * size, bias=False) for _ in range(n_maps))
        gain = 2.0 ** (-8 * torch.arange(config.n_head) / config.n_head) * self.head_dim ** 0.5
        gain = torch.ones(size) if self.fusion == "mul" else gain.repeat_interleave(size // config.n_head)
        for W in self.maps:
            nn.init.normal_(W.weight, std=0.02)
            if config.diagonal_maps:
                W.weight.data.copy_(gain.sqrt().diag().repeat(2, 1))

    def signals(self, positions):
        if positions.dim() == 2:
            return self.fuse(self.embedding(positions))                                     # (T, E)
        # Sequences that share a window share its embeddings.
        windows, which = positions.unique(dim=0, return_inverse=True)
        return self.fuse(self.embedding(windows)[which])                                    # (B, T, E)

    def interpolate(self, shape):
        e = self.embedding(window(self.shape))
        grid = e.T.unflatten(-1, self.shape).unsqueeze(0)                               # (1, E, *self.shape)
        grid = F.interpolate(grid, size=tuple(shape), mode="linear" if self.n_dim == 1 else "bicubic")
        return self.fuse(grid.flatten(2)[0].T)

    def fuse(self, e):
        """e: (T, E) or (B, T, E) -> a list of n_layer Signals."""
        if self.cls is not None:
            e = torch.cat([self.cls.expand(*e.shape[:-2], 1, -1), e], dim=-2)
        n_layer, n_head = self.config.n_layer, self.config.n_head
        if self.fusion == "input":
            return [Signal(input=self.input_gain * e)] + [Signal()] * (n_layer - 1)
        # W e: (..., T, 2 * E), for queries and for keys -> (2, ..., H, T, E/H)
        heads = [W(e).unflatten(-1, (2, n_head, -1)).movedim(-3, 0).transpose(-3, -2) for W in self.maps]
        return [Signal(**{FUSIONS[self.fusion]: each}) for each in heads] * (n_layer // len(heads))


FUSIONS = {"scalar": "extend", "mul": "mul", "add": "add", "input": "input"}    # the field that each one sets
ENCODINGS = {"seqpe": EmbeddingPE, "rope": RoPE, "alibi": ALiBi, "learned": EmbeddingPE,
             "sinusoidal": EmbeddingPE, "nope": PositionEncoding}


# ------------------------------------------------------------------------------------------------------------
# 6. The model


class Transformer(nn.Module):
    """A stack of blocks with a position encoding: what GPT and train_vit.py's ViT have in common."""

    def __init__(self, config, shape, causal):
        super().__init__()
        self.config, self.shape = config, shape         # the training window's shape
        blocks = (Block(config.n_embd, config.n_head, causal) for _ in range(config.n_layer))
        self.blocks = nn.ModuleList(blocks)
        self.ln = nn.LayerNorm(config.n_embd)
        self.apply(_init_weights)
        for block in self.blocks:       # GPT-2: the residual stream's variance does not grow with depth
            for layer in (block.attn.proj, block.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.n_layer))
        self.pe = ENCODINGS[config.pe](config, shape, class_token=not causal)       # has a start of its own

    @property
    def encoder(self):
        """The SeqPE inside, or None."""
        return self.pe.embedding if self.config.pe == "seqpe" else None

    def transform(self, x, signals):
        """Token embeddings x (B, T, C) through all the blocks, with a Signal for each."""
        B, T, _ = x.shape
        if any(t is not None and t.size(-2) != T for signal in signals for t in signal):
            raise ValueError(f"the positions are not as many as the tokens, {T}")
        for block, signal in zip(self.blocks, signals, strict=True):
            x = block(x, signal)
        if len(x) != B:
            raise ValueError(f"the positions are of {len(x)} sequences, the tokens of {B}")
        return self.ln(x)


class GPT(Transformer):
    """A language model in the manner of nanoGPT, with any of the encodings above."""

    def __init__(self, config):
        super().__init__(config, (config.block_size,), causal=True)
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.tokens.weight, std=0.02)       # also the output layer's weights

    def forward(self, idx, targets=None, signals=None):
        """idx: (B, T) tokens -> logits (B, T, vocab_size) and, with targets (B, T), the mean loss in nats.

        signals: what the encoding tells each layer, if not that of positions 0 to T - 1; for example
        model.pe(positions) or model.pe.interpolate((T,)). Targets of -1 do not count.
        """
        signals = self.pe(window(idx.shape[1:])) if signals is None else signals
        logits = F.linear(self.transform(self.tokens(idx), signals), self.tokens.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, T) -> (B, T + max_new_tokens). Each token costs a pass over the whole text."""
        for _ in range(max_new_tokens):
            logits = self(idx)[0][:, -1].float() / temperature
            if top_k is not None:
                kept = logits.topk(min(top_k, logits.size(-1))).values
                logits[logits < kept[:, -1:]] = -math.inf
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, token], dim=1)
        return idx

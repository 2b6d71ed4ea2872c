"""SeqPE: Transformer with Sequential Position Encoding (Li et al., arXiv 2506.13277). MIT licence.

A position is a number, and a number can be written down: with two digits each, (2, 13) is 0 2 1 3. In SeqPE
a small transformer reads the digits and returns e_p, a vector that says where that is. It can read positions
that the model never met in training, and two extra losses keep those in order. From top to bottom:

    1. Positions as digits      position_to_digits, digits_to_position, window
    2. The transformer block    Signal, attend, Attention, Block: the same for encoder, GPT and ViT
    3. The sequential encoder   SeqPE: digits -> e_p
    4. The two extra losses     L_delta and L_OOD, then both in position_regularizers; and start shifting:
                                positions of training sequences are moved (place_windows, count_bias)
    5. Position encodings       seqpe and what it is compared with, behind one small interface
    6. The model                GPT, in the manner of nanoGPT

"The paper's" is what the authors' released code computes. What departs from it is marked "ours:" (and SeqPE's
dropout is 0 by default, there 0.1 or 0.3). A function with an argument `paper` is ours by default; paper=True
makes it the paper's, except what is marked "ours, always:".

The file needs only torch; the README shows how to use it in another model.
Shapes: B sequences of T positions, C the model's width, H heads of D = C / H channels, E the size of e_p.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- 1. Positions as digits -------------------------------------------------------------------------------

def position_to_digits(positions, n_digits, base=10):
    """Write positions in `base`, most significant digit first, padded with zeros: (2, 13) -> 0 2 1 3.

    positions: (..., n_dim) integers from 0 to base ** n_digits - 1 -> (..., K) digits, K = n_dim * n_digits.
    """
    digits = positions.unsqueeze(-1) // base ** torch.arange(n_digits - 1, -1, -1, device=positions.device)
    # The first digit is not wrapped: SeqPE's embedding refuses a number too long even where nobody checks it.
    digits[..., 1:] %= base
    return digits.flatten(-2)


def digits_to_position(digits, n_digits, base=10):
    """The inverse of position_to_digits: (..., n_dim * n_digits) digits -> (..., n_dim) positions."""
    place_values = base ** torch.arange(n_digits - 1, -1, -1, device=digits.device)     # ..., 100, 10, 1
    return (digits.unflatten(-1, (-1, n_digits)) * place_values).sum(-1)


def window(shape):
    """All positions of a box, row by row: shape (T,) for text, (h, w) for images, ... -> (T, n_dim)."""
    return torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape))


# ---- 2. The transformer block, and how any position encoding meets attention ------------------------------

class Signal(NamedTuple):
    """What a position encoding tells one layer. The fields are applied in this order; None does nothing.
    The 2 is (queries, keys), but in rotate (cos, sin). B is left out if all sequences share positions.
    """
    input: Optional[torch.Tensor] = None    # (B, T, C)          x_i + input_i
    mul: Optional[torch.Tensor] = None      # (B, 2, H, T, D)    q_i * mul_i, k_j * mul_j
    add: Optional[torch.Tensor] = None      # (B, 2, H, T, D)    q_i + add_i, k_j + add_j
    rotate: Optional[torch.Tensor] = None   # (B, 2, H, T, D/2)  q_i and k_j turned by an angle
    extend: Optional[torch.Tensor] = None   # (B, 2, H, T, E/H)  q_i . k_j + extend_i . extend_j
    bias: Optional[torch.Tensor] = None     # (B, H, T, T)       logit_ij + bias_ij; takes T x T memory


def _rotate(x, cos_sin):
    """Turn the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by an angle each, as RoPE does."""
    (x1, x2), (cos, sin) = x.chunk(2, dim=-1), cos_sin.to(x.device).unbind(-4)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def attend(q, k, v, eq=None, ek=None, mask=None, causal=True):
    """F.scaled_dot_product_attention with positions: the logits are (q_i . k_j + eq_i . ek_j) / sqrt(D).

    q: (B, H, T, D), eq: (..., H, T, E/H). k, v, ek: the same, with S for T; k and v perhaps of fewer heads
    (grouped queries). mask: (..., T, S), numbers to add to the logits, or booleans or integers, 0: not seen.
    causal: queries stand at the last T of S places, as with a KV cache, and see no later key. -> (B, H, T, D)
    """
    D, V, T, S = q.size(-1), v.size(-1), q.size(-2), k.size(-2)
    if q.size(1) != k.size(1):      # grouped queries: a key for each head, as for ek
        k, v = (each.repeat_interleave(q.size(1) // k.size(1), dim=1) for each in (k, v))
    if eq is not None:
        if (eq.size(-2), ek.size(-2)) != (T, S):
            raise ValueError(f"eq, ek: {eq.size(-2)}, {ek.size(-2)} positions, but q, k have {T}, {S}")
        # The sum of two dot products is that of concatenated vectors: it needs no (T, S) matrix.
        q = torch.cat([q, eq.expand(*q.shape[:-1], -1).type_as(q)], dim=-1)            # (B, H, T, D + E/H)
        k = torch.cat([k, ek.expand(*k.shape[:-1], -1).type_as(k)], dim=-1)
        v = F.pad(v, (0, max(0, k.size(-1) - V)))           # the fused CPU kernel wants v as wide as q and k
    if mask is not None and not mask.is_floating_point():
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -math.inf)
    if causal and (mask is not None or T != S):
        future = torch.full((T, S), -math.inf, device=q.device).triu(1 + S - T)
        mask, causal = future if mask is None else mask.to(q.device) + future, False
    # Divided by sqrt(D), not by the root of the concatenated width: the content's logits stay what they were.
    y = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.type_as(q), is_causal=causal,
                                       scale=D ** -0.5)
    return y[..., :V]


class Attention(nn.Module):
    """Multi-head self-attention: the only place that knows what a signal does to queries and keys."""

    def __init__(self, n_embd, n_head, causal=True, dropout=0.0):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.query = nn.Linear(n_embd, n_embd)
        self.key_value = nn.Linear(n_embd, 2 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, signal=Signal(), last_only=False):
        """x: (B, T, C) -> (B, T, C), or (B, 1, C) if last_only: the last one asks, as [CLS] in section 3."""
        q = self.query(x[:, -1:] if last_only else x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k, v = self.key_value(x).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)    # (B, H, T, D)
        if signal.mul is not None:
            mul_q, mul_k = signal.mul.type_as(q).unbind(-4)
            q, k = q * mul_q, k * mul_k
        if signal.add is not None:
            add_q, add_k = signal.add.type_as(q).unbind(-4)
            q, k = q + add_q, k + add_k
        if signal.rotate is not None:
            q, k = _rotate(q, signal.rotate), _rotate(k, signal.rotate)
        eq, ek = (None, None) if signal.extend is None else signal.extend.unbind(-4)
        y = attend(q, k, v, eq, ek, signal.bias, self.causal and not last_only)                # (B, H, T, D)
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A pre-norm transformer layer (GPT-2's), for the encoder, GPT and ViT alike.

    approximate: form of GELU, "tanh" in the encoder, "none" (the exact one) in ViT, and (ours) in GPT, too.
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


# ---- 3. The sequential encoder ----------------------------------------------------------------------------

class SeqPE(nn.Module):
    """Reads the digits of a position and returns its embedding e_p, of size n_embd.

    n_head: heads of the encoder and of the attention that uses e_p. n_dim: coordinates of a position, each 0
    to max_position - 1, in as many digits as that takes in `base`. max_position, ours: a hard limit; choose
    little more than your longest input, as the losses have to order every position below it. width: of the
    encoder; None: n_embd. 64 to 96 is plenty. head_norm: the length of e_p in each head.
    """

    def __init__(self, n_embd, n_head=4, n_layer=2, n_dim=1, base=10, max_position=20_000, width=None,
                 dropout=0.0, head_norm=None):
        super().__init__()
        width = width or n_embd
        if (min(n_embd, n_head, n_layer, n_dim, width, base - 1) < 1 or not 2 <= max_position <= 2 ** 30
                or n_embd % n_head or width % n_head or head_norm and n_embd == n_head):
            raise ValueError(f"SeqPE: n_embd={n_embd} and width={width} must be multiples of n_head={n_head} "
                             "(with head_norm n_embd > n_head), base 2 or more, max_position 2 to 2**30")
        n_digits = next(n for n in range(1, 31) if base ** n >= max_position)
        self.n_embd, self.n_head, self.n_dim, self.n_digits, self.base = n_embd, n_head, n_dim, n_digits, base
        self.max_position, self.head_norm = max_position, head_norm
        self.symbol = nn.Embedding(base, width)         # which digit
        self.place = nn.Embedding(n_dim * n_digits, width)                      # at which of the K places
        self.dimension = nn.Embedding(n_dim, width) if n_dim > 1 else None    # of which coordinate
        self.cls = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(width, n_head, True, dropout, "tanh") for _ in range(n_layer))
        self.ln = nn.LayerNorm(width)
        self.proj = nn.Linear(width, n_embd)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw all weights anew: for after a host model's own initialisation, or one on the meta device."""
        self.apply(_init_weights)
        nn.init.normal_(self.cls, std=0.02)

    def forward(self, positions):
        """positions: (..., n_dim) integers -> e_p: (..., n_embd). ValueError for what is no position.

        The range is checked on a CPU alone (a GPU would be waited for), and not while torch compiles.
        """
        if positions.dim() == 0 or positions.size(-1) != self.n_dim:
            raise ValueError(f"positions must be (..., n_dim={self.n_dim}), got {tuple(positions.shape)}")
        if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
            lowest, highest = int(positions.min()), int(positions.max())
            if lowest < 0 or highest >= self.max_position:
                raise ValueError(f"positions {lowest} to {highest} are past the limit: this SeqPE holds 0 to "
                                 f"{self.max_position - 1}; make it with a larger max_position")
        digits = position_to_digits(positions, self.n_digits, self.base).to(self.cls.device)        # (..., K)
        # A symbol is embedded as the sum of what it is, its place and its dimension.
        x = self.symbol(digits.reshape(-1, digits.size(-1))) + self.place.weight        # (n, K, width)
        if self.dimension is not None:
            x = x + self.dimension.weight.repeat_interleave(self.n_digits, dim=0)
        # Attention is causal, as in a language model: so [CLS] stands last, where it sees all digits.
        x = torch.cat([x, self.cls.expand(x.size(0), 1, -1)], dim=1)                 # (n, K + 1, width)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, last_only=True)              # only [CLS] is read, so only [CLS] asks
        e = self.proj(self.ln(x[:, 0]))
        if self.head_norm:
            # ours: the same length in each head, so that a dot product says how near, and nothing else.
            e = self.head_norm * F.normalize(e.unflatten(-1, (self.n_head, -1)), dim=-1)
        return e.reshape(*digits.shape[:-1], self.n_embd)


# ---- 4. The two extra losses, and start shifting ----------------------------------------------------------

def contrastive_loss(e, positions, n_head, paper=False):
    """L_delta: near positions get similar embeddings. In a group, which is a pivot i and its candidates, the
    candidate nearest to i, called c, has to be found:

        L_delta = mean over pivots i of  - log( exp(e_i . e_c) / sum_j exp(e_i . e_j) )

    Not among the j: i itself, copies of i or c, and (ours, always:) other positions exactly as near as c.
    e: (P, N, E), the embeddings of P groups of positions (P, N, n_dim) -> scalar. In the paper the first of a
    group is its pivot, and all of e is compared. ours: all are pivots in turn, and heads are compared apart.
    """
    n_head, n_pivots = (1, 1) if paper else (n_head, positions.size(1))
    pivots, others = positions[:, :n_pivots].unsqueeze(2), positions.unsqueeze(1)
    same = (pivots == others).all(-1)                                                   # (P, n_pivots, N)
    distance = (pivots - others).pow(2).sum(-1).masked_fill(same, torch.iinfo(torch.int64).max)
    least, nearest = distance.min(-1, keepdim=True)                                     # (P, n_pivots, 1)
    ties = (distance == least).scatter(-1, nearest, False)
    e = e.unflatten(-1, (n_head, -1)).transpose(1, 2)                                   # (P, H, N, E/H)
    logits = e[:, :, :n_pivots] @ e.transpose(-2, -1)                                   # (P, H, n_pivots, N)
    logits = logits.masked_fill((same | ties).unsqueeze(1), -math.inf)
    return F.cross_entropy(logits.flatten(0, 2), nearest.transpose(1, 2).expand(-1, n_head, -1).flatten())


def sample_groups(encoder, n_groups, n_candidates, paper=False):
    """Groups for L_delta, a pivot and then its M candidates: positions (P, 1 + M, n_dim).

    Candidates are drawn in three ways, each in a share of the groups:      paper: images, text   ours
        plain    from all positions                                                0.5     0      0.2
        hard     plain, but up to a fifth are decoys                               0.3     0.4    0
        window   from a short window: close numbers must be told apart             0.2     0.6    0.8

    A decoy is written much like the pivot, but is farther away than the nearest plain candidate. The paper's
    window is a box of 256 or 17 x 17 positions, mostly far from the pivot. ours: around the pivot and mostly
    small, as plain candidates hardly teach a distance of 1: of 32 drawn below 2,048 the nearest is about 32
    away. ours, always: 16 x 16; positions may repeat; for text paper=True has the shares of images.
    """
    n_dim, max_position, device = encoder.n_dim, encoder.max_position, encoder.cls.device
    kwargs = dict(dtype=torch.float32, device=device)       # products may round up: hence the last clamp
    pivots = torch.randint(max_position, (n_groups, 1, n_dim), device=device)
    plain = torch.randint(max_position, (n_groups, n_candidates, n_dim), device=device)
    if paper:
        size = min(round(256 ** (1 / n_dim)), max_position)
        start = (torch.rand(n_groups, 1, n_dim, **kwargs) * (max_position - size + 1)).long()
    else:       # size 4 to max_position, the small ones likeliest
        smallest = min(4, max_position)
        size = (smallest * (max_position / smallest) ** torch.rand(n_groups, 1, 1, **kwargs).square()).long()
        start = pivots - (torch.rand(n_groups, 1, n_dim, **kwargs) * size).long()
        start = start.clamp(min=0).minimum(max_position - size)
    close = (start + (torch.rand(plain.shape, **kwargs) * size).long()).clamp(max=max_position - 1)
    way = torch.rand(n_groups, 1, 1, **kwargs)
    if not paper:
        return torch.cat([pivots, torch.where(way < 0.2, plain, close)], dim=1)
    n_hard = n_candidates // 5
    hard, rest = sample_hard_negatives(encoder, pivots.squeeze(1), n_hard), plain[:, n_hard:]
    far_hard, far_plain = ((each - pivots).pow(2).sum(-1, keepdim=True) for each in (hard, rest))
    least = far_plain.masked_fill(far_plain == 0, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    stays = (far_hard > least) & (hard < max_position).all(-1, keepdim=True)            # (P, n_hard, 1)
    hard = torch.cat([torch.where(stays, hard, plain[:, :n_hard]), rest], dim=1)
    candidates = torch.where(way < 0.5, plain, torch.where(way < 0.8, hard, close))
    return torch.cat([pivots, candidates], dim=1)


def sample_hard_negatives(encoder, pivots, n_negatives):
    """Positions written much like a pivot: 1 to 3 random edits of 4 kinds. At the third place of 5 6 7 8 9:

        insert a 3           6 7 3 8 9      digits up to there move left, the first drops out
        delete the 7         0 5 6 8 9      digits before it move right, a zero comes in front
        swap it with the 6   5 7 6 8 9      or with any other
        replace it by a 3    5 6 3 8 9      or by any other digit

    (P, n_dim) -> (P, n_negatives, n_dim). ours, always: all K digits are edited, as one row. The paper edits
    the number without zeros in front; the digits of two coordinates are joined, and cut at random afterwards.
    Where an edit gives the pivot or passes the limit, the paper draws another. (sample_groups drops it here.)
    """
    digits = position_to_digits(pivots, encoder.n_digits, encoder.base).unsqueeze(1).repeat(1, n_negatives, 1)
    K, base, device = digits.size(-1), encoder.base, pivots.device
    here = torch.arange(K, device=device)
    draw = partial(torch.randint, size=(*digits.shape[:-1], 1), device=device)          # (P, n_negatives, 1)
    n_edits = 1 + draw(3)
    for i in range(3):
        kind, at, other = draw(4), draw(K), draw(K)
        digit_at, digit_other = digits.gather(-1, at), digits.gather(-1, other)
        different, any_digit = (digit_at + 1 + draw(base - 1)) % base, draw(base)
        edited = torch.stack([          # insert, delete, swap, replace: (4, P, n_negatives, K)
            torch.where(here == at, any_digit, torch.where(here < at, digits.roll(-1, -1), digits)),
            torch.where(here <= at, F.pad(digits, (1, -1)), digits),
            torch.where(here == at, digit_other, torch.where(here == other, digit_at, digits)),
            torch.where(here == at, different, digits)])
        edited = edited.take_along_dim(kind.unsqueeze(0), dim=0).squeeze(0)
        digits = torch.where(i < n_edits, edited, digits)
    return digits_to_position(digits, encoder.n_digits, base)


def distillation_loss(e_teacher, e_students, n_head, paper=False):
    """L_OOD: a window elsewhere (student) gets the inner geometry of the training window (teacher).

        t_ij = softmax over j of e_i . e_j  for m positions of the teacher, s_ij for those of a student
        L_OOD = mean over rows i of  sum_j (t_ij - s_ij) (log t_ij - log s_ij)  =  KL(t_i, s_i) + KL(s_i, t_i)

    e_teacher: (m, E), which receives no gradient; e_students: (S, m, E) -> scalar: a mean over students and
    heads, too, as in the paper. ours: the sum over j, as in a KL. The paper has the mean, m times less.
    """
    def log_rows(e):
        e = e.unflatten(-1, (n_head, -1)).transpose(-3, -2)     # (..., H, m, E/H)
        return F.log_softmax(e @ e.transpose(-2, -1), dim=-1)   # (..., H, m, m)

    teacher, students = log_rows(e_teacher.detach()), log_rows(e_students)
    rows = ((teacher.exp() - students.exp()) * (teacher - students)).sum(-1)            # (S, H, m)
    return rows.mean() / (rows.size(-1) if paper else 1)


def position_regularizers(encoder, shape, contrast_weight=0.1, distill_weight=0.1, n_groups=4, paper=False):
    """contrast_weight * L_delta + distill_weight * L_OOD, a scalar: what a step adds to the model's loss.

    shape: the training window, (T,) or (h, w). Both weights are the paper's. n_groups is ignored with paper.
    ours, always: students lie anywhere, and all are compared at the same m of their T places, at random.
    The paper draws the m for each student, and has students at T / 4 or later (images: beyond the teacher).
    """
    n_candidates, n_students, m = 32, 4, 32     # ours
    if paper:       # its numbers, for each GPU
        n_groups, n_candidates, n_students, m = (16, 32, 16, 32) if len(shape) == 1 else (32, 64, 32, 64)
    device = encoder.cls.device
    loss = torch.zeros((), device=device)
    if contrast_weight:
        groups = sample_groups(encoder, n_groups, n_candidates, paper)                  # (P, 1 + M, n_dim)
        e = encoder(groups)
        loss = loss + contrast_weight * contrastive_loss(e, groups, encoder.n_head, paper)
    if distill_weight:
        teacher = window(shape).to(device).unsqueeze(0)                                 # (1, T, n_dim)
        students = place_windows(shape, n_students, encoder.max_position, max_pieces=1, device=device)
        chosen = torch.randperm(teacher.size(1), device=device)[:m]
        e = encoder(torch.cat([teacher, students])[:, chosen])                          # (1 + S, m, E)
        loss = loss + distill_weight * distillation_loss(e[0], e[1:], encoder.n_head, paper)
    return loss


def pretrain_encoder(encoder, shape, steps=1000, learning_rate=2e-3, progress=iter):
    """ours: order all positions before the model's first step. A short training would not get that far.
    The two losses alone; L_delta has weight 1 and four times the groups. progress: tqdm, for example.
    """
    optimizer = torch.optim.AdamW(encoder.parameters(), betas=(0.9, 0.95))
    for step in progress(range(steps)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        loss = position_regularizers(encoder, shape, 1.0, n_groups=16)
        if not loss.isfinite():
            raise ValueError(f"no finite loss in step {step}: reset_parameters(), float32 or a lower rate")
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def place_windows(shape, n_windows, max_position, max_pieces=4, device=None):
    """Start shifting: windows at random places, for training to meet far positions -> (n_windows, T, n_dim).

    shape: the training window, (T,) or (h, w). The paper moves it as a whole (max_pieces=1), to one of 320
    places drawn once. ours: drawn each time, and each axis is torn at random into 1 to max_pieces pieces, for
    long distances in a short window (PoSE, Zhu et al. 2024): 0 1 2 | 3 4 becomes 17 18 19 | 805 806.
    """
    if max(shape) > max_position:
        raise ValueError(f"a window of {tuple(shape)} does not fit into max_position={max_position}")
    # All pieces but the first begin at a cut. An unused piece has its cut at infinity: no place is in it.
    places = window(shape).to(device)                                                   # (T, n_dim)
    n_pieces = torch.randint(1, max_pieces + 1, (n_windows, 1, 1), device=device)
    unused = torch.arange(max_pieces, device=device).view(-1, 1) >= n_pieces    # (n_windows, max_pieces, 1)
    offsets = torch.stack([torch.randint(max_position - size + 1, (n_windows, max_pieces), device=device)
                           for size in shape], dim=-1)                      # (n_windows, max_pieces, n_dim)
    offsets = offsets.masked_fill(unused, max_position).sort(1).values      # unused last
    cuts = torch.rand(n_windows, max_pieces - 1, len(shape), dtype=torch.float32, device=device)
    cuts = (cuts * torch.tensor(shape, device=device)).masked_fill(unused[:, 1:], math.inf).unsqueeze(1)
    piece = (places.unsqueeze(1) >= cuts).sum(2)            # cuts before each place: (n_windows, T, n_dim)
    return places + offsets.gather(1, piece)


def count_bias(positions):
    """ours: how much the keys of torn windows count: positions (B, T, 1) -> (B, 1, T, T), a mask for attend.

    A piece of 32 keys before a gap of 968 positions stands for the 1,000 keys of a long text. For queries
    after the gap each of the 32 counts 1,000 / 32 times: log(1000 / 32) is added to its logits (sampled
    softmax). Without it, heads that look far meet only T keys in training, and drown among thousands later.
    But a head that looks for one certain key would find it 31 times, where a long text has it once: so only a
    random share of the log is added, 0 to 1 for each window.
    """
    if positions.dim() != 3 or positions.size(-1) != 1:
        raise ValueError(f"count_bias is for windows of text, (B, T, 1), not for {tuple(positions.shape)}")
    step = positions.squeeze(-1).diff()                                                 # (B, T - 1)
    gap = F.pad((step - 1).clamp(min=0), (0, 1))                    # (B, T): positions skipped after each
    piece = F.pad(step != 1, (1, 0)).cumsum(-1)                     # (B, T): the number of its piece
    same = piece.unsqueeze(-1) == piece.unsqueeze(-2)                                   # (B, T, T)
    count = 1 + (same * gap.unsqueeze(-2)).sum(-1).float() / same.sum(-1)               # (B, T): 1000 / 32
    share = torch.rand(len(gap), 1, dtype=torch.float32, device=gap.device)
    return (share * count.log()).unsqueeze(-2).masked_fill(same, 0.0).unsqueeze(1)      # 0 within a piece


# A training step, with GPT (sections 5 and 6). ours: four of eight windows move. The paper: in a random
# tenth of the steps all 32 texts of a GPU move, to 16 of its 320 places; these steps are without L_OOD.
#     windows = place_windows((128,), 8, max_position)            # (8, 128, 1)
#     windows[4:] = window((128,))                                # four stay: 0 to 127
#     which = torch.randperm(8)[torch.arange(B) % 8]              # the B sequences share the eight evenly
#     bias = count_bias(windows)[which]
#     signals = [signal._replace(bias=bias) for signal in model.pe(windows, which)]           # one per layer
#     loss = model(idx, targets, signals)[1] + position_regularizers(model.pe.encoder, (128,))


# ---- 5. Position encodings: positions in, one Signal for each layer out -----------------------------------

@dataclass
class TransformerConfig:
    """What GPT and train_vit.py's ViT have in common. The sizes are ours."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    pe: str = "seqpe"           # a key of ENCODINGS; what follows is for SeqPE alone
    fusion: str = "scalar"      # how its e_p enters the model, a key of FUSIONS
    max_position: int = 2048    # this and the next three: see SeqPE
    base: int = 10
    pe_dropout: float = 0.0
    head_norm: Optional[float] = None
    pe_embd: Optional[int] = None       # size of e_p, n_embd if not given; for the fusion "scalar" alone
    diagonal_maps: bool = False         # how the maps W start: N(0, 0.02), or diagonal (see EmbeddingPE)


@dataclass
class GPTConfig(TransformerConfig):
    block_size: int = 128       # the training length, in tokens; a limit for pe="learned" alone
    vocab_size: int = 256


class PositionEncoding(nn.Module):
    """positions (T, n_dim) or (B, T, n_dim) -> a list of n_layer Signals. This one is nope: no encoding.

    shape: the training window's. class_token: signals have a row for it, in front.
    which: (B,), for B sequences that share windows: sequence b has positions[which[b]].
    """

    def __init__(self, config, shape, class_token=False):
        super().__init__()
        self.config, self.shape, self.n_dim, self.class_token = config, shape, len(shape), class_token
        self.head_dim = config.n_embd // config.n_head
        self.encoder = self.max_position = None     # the SeqPE inside, and the hard limit, if there are any

    def forward(self, positions, which=None):
        if positions.dim() not in ((2, 3) if which is None else (3,)) or positions.size(-1) != self.n_dim:
            raise ValueError(f"positions must be (..., T, {self.n_dim}), got {tuple(positions.shape)}")
        signals = self.signals(positions)
        if which is None:
            return signals
        return [Signal(*(t if t is None else t[which] for t in signal)) for signal in signals]

    def signals(self, positions):
        return [Signal()] * self.config.n_layer

    def interpolate(self, shape):
        """ours: the signals of another window, squeezed into that of training (EmbeddingPE resizes e_p)."""
        return self((window(shape).float() + 0.5) * torch.tensor(self.shape) / torch.tensor(shape) - 0.5)


class RoPE(PositionEncoding):
    """Su et al. 2021; for images Heo et al. 2024: a pair of channels is turned by frequency * coordinate."""

    def __init__(self, config, shape, class_token=False):
        super().__init__(config, shape, class_token)
        if self.head_dim % (2 * self.n_dim):
            raise ValueError(f"rope needs n_embd / n_head={self.head_dim} divisible by {2 * self.n_dim}")

    def frequency(self, device):
        """(1, 1, n_dim, D/2); a subclass may give (n_layer, H, ...). In float32, as angles need it."""
        n_pairs, theta = self.head_dim // 2 // self.n_dim, 10000.0 if self.n_dim == 1 else 100.0
        of_one = theta ** (-torch.arange(n_pairs, dtype=torch.float32, device=device) / n_pairs)
        return torch.block_diag(*(self.n_dim * [of_one[None]]))[None, None]

    def signals(self, positions):
        frequency = self.frequency(positions.device)
        positions = positions.to(frequency.device, torch.float32)[..., None, None, :, :, None]
        # A product, then a sum over n_dim; autocast would round the angles of a matrix product to 8 bits.
        angle = (positions * frequency.unsqueeze(-3)).sum(-2)       # (..., n_layer or 1, H or 1, T, D/2)
        angle = F.pad(angle, (0, 0, int(self.class_token), 0))      # a class token is not turned
        rotate = torch.stack([angle.cos(), angle.sin()], dim=-4).movedim(-5, 0)  # (layer, ..., 2, H, T, D/2)
        return [Signal(rotate=layer) for layer in rotate.expand(self.config.n_layer, *rotate.shape[1:])]


class ALiBi(PositionEncoding):
    """Press et al. 2022, for text alone: the logit falls with distance, - slope_h * (i - j).
    ours: as in Press et al., it is not divided by sqrt(D); the authors' code divides it. Under a softmax
    -slope * i, the same for a whole row, cancels; slope * j is left, a dot product, too. j is split in two,
    256 * a + b, so that bfloat16 holds each part exactly.
    """

    def signals(self, positions):
        head = torch.arange(1, self.config.n_head + 1, dtype=torch.float32, device=positions.device)
        slope = 2.0 ** (-8 * head / len(head)) * self.head_dim ** 0.5   # attend divides by sqrt(D)
        j = torch.cat([positions - positions % 256, positions % 256], dim=-1).float().unsqueeze(-3)
        extend = torch.stack(torch.broadcast_tensors(slope.view(-1, 1, 1), j), dim=-4)  # (..., 2, H, T, 2)
        return [Signal(extend=extend)] * self.config.n_layer


class EmbeddingPE(PositionEncoding):
    """Encodings that make a vector e_p of each position, and how it enters the model:

        input   x_i + input_gain * e_i, once, before the first layer
        scalar  a number, eq_i . ek_j, is added to q_i . k_j; one W for all layers (images: one for each)
        mul     q_i * eq_i and k_j * ek_j, a W for each layer
        add     q_i + eq_i and k_j + ek_j, a W for each layer

    with [eq, ek] = W e + b. All four are in the authors' code, which has scalar for text and mul for
    images, and W starts at N(0, 0.02). ours: with diagonal_maps W starts as the identity for mul; for
    scalar and add such that eq_i . ek_j / sqrt(D) is g * e_i . e_j, which L_delta makes fall with distance. g
    is 1 in the first head and 1/64 in the last of four: some begin by looking nearby, some everywhere.
    """

    def __init__(self, config, shape, class_token=False):
        super().__init__(config, shape, class_token)
        C, n_head, n_layer, is_seqpe = config.n_embd, config.n_head, config.n_layer, config.pe == "seqpe"
        self.fusion = config.fusion if is_seqpe else "input"
        # ours: with pe_embd e_p is narrower than C, as attention pays for each of its channels.
        size = (config.pe_embd or C) if self.fusion == "scalar" else C
        if is_seqpe:
            self.max_position = config.max_position
            self.encoder = SeqPE(size, n_head, n_dim=self.n_dim, base=config.base, dropout=config.pe_dropout,
                                 max_position=self.max_position, head_norm=config.head_norm)
        elif config.pe == "learned":
            self.max_position = max(shape)
            self.table = nn.Parameter(torch.randn(*shape, C) * 0.02)
        elif C % (2 * self.n_dim):      # sinusoidal
            raise ValueError(f"sinusoidal in {self.n_dim}-D needs n_embd={C} divisible by {2 * self.n_dim}")
        # A class token is not in the grid: it learns a vector. ours: with head_norm it starts at std 1, as
        # e_p's channels have head_norm / sqrt(E/H), 1.2 in train_vit.py; with input at 0.02, as tokens do.
        std = 1.0 if is_seqpe and config.head_norm and self.fusion != "input" else 0.02
        self.cls = nn.Parameter(torch.randn(size) * std) if class_token else None
        # ours: a gain of 0.1, as tokens start at 0.02 and would stay unread beside larger vectors.
        gained = self.fusion == "input" and config.pe != "learned"
        self.input_gain = nn.Parameter(torch.tensor(0.1)) if gained else 1.0
        n_maps = {"input": 0, "scalar": 1 if self.n_dim == 1 else n_layer}.get(self.fusion, n_layer)
        self.maps = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(n_maps))
        scale = 2.0 ** (-8 * torch.arange(n_head) / n_head) * self.head_dim ** 0.5      # g * sqrt(D)
        scale = torch.ones(size) if self.fusion == "mul" else scale.repeat_interleave(size // n_head)
        for W in self.maps:
            _init_weights(W)
            if config.diagonal_maps:
                W.weight.data.copy_(scale.sqrt().diag().repeat(2, 1))

    def embed(self, positions):
        if self.config.pe == "seqpe":
            return self.input_gain * self.encoder(positions)
        if self.config.pe == "learned":     # IndexError beyond the window, and for a negative position
            index = zip(positions.long().unbind(-1), self.shape)
            return self.table[tuple(torch.where(each < 0, size, each) for each, size in index)]
        # Vaswani et al. 2017. ours: with several dimensions each has its share of the channels.
        n_pairs, device = self.config.n_embd // 2 // self.n_dim, self.input_gain.device
        frequency = 10000.0 ** (-torch.arange(n_pairs, dtype=torch.float32, device=device) / n_pairs)
        angle = positions.to(device).unsqueeze(-1) * frequency                          # (..., n_dim, n)
        return self.input_gain * torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)

    def signals(self, positions):
        return self.fuse(self.embed(positions))

    def interpolate(self, shape):
        """The embeddings of the training window are resized, as in the authors' code for images."""
        grid = self.embed(window(self.shape)).T.unflatten(-1, self.shape).unsqueeze(0)  # (1, E, *self.shape)
        grid = F.interpolate(grid, size=tuple(shape), mode="linear" if self.n_dim == 1 else "bicubic")
        return self.fuse(grid.flatten(2)[0].T)

    def fuse(self, e):
        """e: (T, E) or (B, T, E) -> a list of n_layer Signals."""
        if self.cls is not None:
            e = torch.cat([self.cls.expand(*e.shape[:-2], 1, -1), e], dim=-2)
        n_layer, n_head = self.config.n_layer, self.config.n_head
        if self.fusion == "input":
            return [Signal(input=e)] + [Signal()] * (n_layer - 1)
        # W e: (..., T, 2 * E), for queries and for keys -> (..., 2, H, T, E/H)
        heads = [W(e).unflatten(-1, (2, n_head, -1)).movedim(-4, -2) for W in self.maps]
        return [Signal(**{FUSIONS[self.fusion]: each}) for each in heads] * (n_layer // len(heads))


FUSIONS = {"scalar": "extend", "mul": "mul", "add": "add", "input": "input"}    # the field that each one sets
ENCODINGS = {"seqpe": EmbeddingPE, "rope": RoPE, "alibi": ALiBi, "learned": EmbeddingPE,
             "sinusoidal": EmbeddingPE, "nope": PositionEncoding}


# ---- 6. The model -----------------------------------------------------------------------------------------

class Transformer(nn.Module):
    """A stack of blocks with a position encoding, for GPT and train_vit.py's ViT. ours: it has no dropout."""

    def __init__(self, config, shape, causal):
        super().__init__()
        self.config, self.shape = config, shape         # the training window's shape
        blocks = (Block(config.n_embd, config.n_head, causal) for _ in range(config.n_layer))
        self.blocks, self.ln = nn.ModuleList(blocks), nn.LayerNorm(config.n_embd)
        self.apply(_init_weights)
        for block in self.blocks:       # GPT-2: the residual stream's variance does not grow with depth
            for layer in (block.attn.proj, block.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.n_layer))
        self.pe = ENCODINGS[config.pe](config, shape, class_token=not causal)       # initialises itself

    def transform(self, x, signals):
        """Token embeddings x (B, T, C) through all the blocks, with a Signal for each."""
        for block, signal in zip(self.blocks, signals, strict=True):
            B, T, _ = x.shape
            x = block(x, signal)        # may broadcast a signal that does not fit, without a word
            if x.size(0) != B or any(t is not None and t.size(-2) != T for t in signal):
                raise ValueError(f"the signals are not of the positions of {B} sequences of {T} tokens")
        return self.ln(x)


class GPT(Transformer):
    """A language model in the manner of nanoGPT, with any of the encodings above."""

    def __init__(self, config):
        super().__init__(config, (config.block_size,), causal=True)
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.tokens.weight, std=0.02)       # also the output layer's weights

    def forward(self, idx, targets=None, signals=None):
        """idx: (B, T) tokens -> logits (B, T, vocab_size) and, with targets (B, T), the mean loss in nats.

        signals: model.pe(positions), or other such; by default those of positions 0 to T - 1.
        """
        signals = self.pe(window(idx.shape[1:])) if signals is None else signals
        logits = F.linear(self.transform(self.tokens(idx), signals), self.tokens.weight)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

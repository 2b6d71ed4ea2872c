"""SeqPE: Transformer with Sequential Position Encoding (Li et al., arXiv 2506.13277). MIT licence.

A position is a number, and a number can be written down: with two digits each, (2, 13) is 0 2 1 3 (section
1). A small transformer (2) reads the digits and returns e_p, a vector that stands for it (3). In
training some sequences are moved to far positions (4), and two extra losses keep all positions in order (5).
Then come how e_p and other encodings enter a model (6), a GPT (7), and a training step that uses it all.

"The paper's" is what the authors' released code computes. What departs from it is marked "ours:". The losses
of section 5 are ours by default; paper=True makes them the paper's, except for what is "ours, always:".
Shapes: B sequences of T positions, C the model's width, H heads of D channels each, E the size of e_p.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- 1. Positions as digits -------------------------------------------------------------------------------

def position_to_digits(positions, n_digits):
    """(..., n_dim) positions -> (..., n_dim * n_digits) digits, with zeros in front: (2, 13) -> 0 2 1 3."""
    place_values = 10 ** torch.arange(n_digits - 1, -1, -1, device=positions.device)    # ..., 100, 10, 1
    digits = positions.unsqueeze(-1) // place_values                                # (..., n_dim, n_digits)
    # The first digit is not wrapped: of a number that is too long it is 10 or more, an error when embedded.
    digits[..., 1:] %= 10
    return digits.flatten(-2)


def window(shape):
    """All positions of a box, row by row: shape (T,) for text, (h, w) for images, ... -> (T, n_dim)."""
    return torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape))


# ---- 2. The transformer block, and how any position encoding meets attention ------------------------------

class Signal(NamedTuple):
    """What a position encoding tells one layer. The fields are applied in this order; None does nothing.
    An axis of size 2 holds (queries, keys), in rotate (cos, sin). B is left out if all share positions.
    """
    input: torch.Tensor | None = None       # (B, T, C)          x_i + input_i
    mul: torch.Tensor | None = None         # (B, 2, H, T, D)    q_i * mul_i, k_j * mul_j
    rotate: torch.Tensor | None = None      # (B, 2, H, T, D/2)  q_i and k_j turned by an angle
    extend: torch.Tensor | None = None      # (B, 2, H, T, E/H)  q_i . k_j + extend_i . extend_j


def _rotate(x, cos_sin):
    """Turn the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by an angle each, for RoPE."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos_sin.to(x.device).unbind(-4)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def attend(q, k, v, eq=None, ek=None, mask=None, causal=True):
    """F.scaled_dot_product_attention with positions: the logits are (q_i . k_j + eq_i . ek_j) / sqrt(D).

    q: (B, H, T, D), eq: (..., H, T, E/H). k, v, ek: the same, with S for T; k and v perhaps of fewer heads
    (grouped queries). mask: (..., T, S), numbers to add to the logits, or booleans, True where a key is seen.
    causal: queries stand at the last T of S places, as with a KV cache, and see no later key. -> (B, H, T, D)
    """
    (H, T, D), (H_k, S), v_width = q.shape[1:], k.shape[1:3], v.size(-1)
    if H % H_k or causal and T > S:
        raise ValueError(f"q of {H} heads and {T} positions does not fit k of {H_k} heads and {S} positions")
    if H != H_k:        # grouped queries: a key for each head, as for ek
        k, v = (each.repeat_interleave(H // H_k, dim=1) for each in (k, v))
    if eq is not None:
        if (eq.size(-2), ek.size(-2)) != (T, S):
            raise ValueError(f"eq, ek: {eq.size(-2)}, {ek.size(-2)} positions, but q, k have {T}, {S}")
        # The sum of two dot products is that of concatenated vectors: it needs no (T, S) matrix.
        q = torch.cat([q, eq.expand(*q.shape[:-1], -1).type_as(q)], dim=-1)             # (B, H, T, D + E/H)
        k = torch.cat([k, ek.expand(*k.shape[:-1], -1).type_as(k)], dim=-1)
        v = F.pad(v, (0, ek.size(-1)))              # the fused CPU kernel wants v as wide as q and k
    if mask is not None:
        if not mask.is_floating_point() and mask.dtype != torch.bool:
            raise ValueError(f"a mask is booleans, or numbers to add, not {mask.dtype}")
        mask = (torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask).to(q)
    if causal and (mask is not None or T != S):
        # is_causal takes no mask beside it. And it aligns queries to the first keys, not to the last.
        future = q.new_full((T, S), -math.inf).triu(1 + S - T)
        mask = future if mask is None else mask + future
        causal = False
    # Divided by sqrt(D), not by the root of the concatenated width: the content's logits stay what they were.
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=D ** -0.5)
    return y[..., :v_width]


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
        """x: (B, T, C) -> (B, T, C), or (B, 1, C) if last_only: only the last is a query (section 3)."""
        q = self.query(x[:, -1:] if last_only else x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k, v = self.key_value(x).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)    # (B, H, T, D)
        if signal.mul is not None:
            mul_q, mul_k = signal.mul.type_as(q).unbind(-4)
            q, k = q * mul_q, k * mul_k
        if signal.rotate is not None:
            q, k = _rotate(q, signal.rotate), _rotate(k, signal.rotate)
        eq, ek = (None, None) if signal.extend is None else signal.extend.unbind(-4)
        y = attend(q, k, v, eq, ek, causal=self.causal and not last_only)                      # (B, H, T, D)
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """GPT-2's pre-norm layer. GELU is "tanh" in the encoder, exact ("none") in ViT and, ours, in GPT."""

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
    """GPT-2's initialisation; [CLS] has that of a symbol."""
    if isinstance(module, SeqPE):
        nn.init.normal_(module.cls, std=0.02)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()


# ---- 3. The sequential encoder ----------------------------------------------------------------------------

class SeqPE(nn.Module):
    """Reads the digits of a position and returns its embedding e_p, of size pe_embd.
    n_head: heads of the encoder, and of the attention that uses e_p. n_dim: how many coordinates a position
    has, each 0 to max_position - 1. ours: that is a hard limit (the paper's is its digits': 99,999 for
    text, 99 for images). Choose little more than your longest input: the losses have to order all below it.
    ours: dropout is 0 (the paper 0.1 or 0.3), and head_norm, if given, is the length of e_p in each head.
    """

    def __init__(self, pe_embd, n_head=4, n_dim=1, max_position=20_000, dropout=0.0, head_norm=None):
        super().__init__()
        if not 4 <= max_position <= 2 ** 30:    # the least box of sample_groups; squares fit into int64
            raise ValueError(f"max_position={max_position} must be from 4 to 2**30")
        self.pe_embd, self.n_head, self.n_dim = pe_embd, n_head, n_dim
        self.max_position, self.head_norm = max_position, head_norm
        self.n_digits = len(str(max_position - 1))
        self.symbol = nn.Embedding(10, pe_embd)                                 # which digit
        self.place = nn.Embedding(n_dim * self.n_digits, pe_embd)               # at which of K places
        self.dimension = nn.Embedding(n_dim, pe_embd) if n_dim > 1 else None    # of which coordinate
        self.cls = nn.Parameter(torch.empty(pe_embd))
        self.blocks = nn.ModuleList(Block(pe_embd, n_head, True, dropout, "tanh") for _ in range(2))
        self.ln = nn.LayerNorm(pe_embd)
        self.proj = nn.Linear(pe_embd, pe_embd)
        self.apply(_init_weights)

    def forward(self, positions):
        """positions: (..., n_dim) integers -> e_p: (..., pe_embd)."""
        if positions.dim() == 0 or positions.size(-1) != self.n_dim:
            raise ValueError(f"positions must be (..., n_dim={self.n_dim}), got {tuple(positions.shape)}")
        # Not checked on a GPU, which would stall, nor in compiled code: 9,999 passes a limit of 2,048 there.
        if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
            lowest, highest = int(positions.min()), int(positions.max())
            if lowest < 0 or highest >= self.max_position:
                raise ValueError(f"positions {lowest} to {highest} are past the limit: this SeqPE holds 0 to "
                                 f"{self.max_position - 1}; make it with a larger max_position")
        digits = position_to_digits(positions, self.n_digits).to(self.cls.device)       # (..., K)
        # A symbol is embedded as the sum of what it is, its place and its dimension.
        x = self.symbol(digits.reshape(-1, digits.size(-1))) + self.place.weight        # (n, K, pe_embd)
        if self.dimension is not None:
            x = x + self.dimension.weight.repeat_interleave(self.n_digits, dim=0)
        # Attention is causal, as in a language model: so [CLS] stands last, where it sees all digits.
        x = torch.cat([x, self.cls.expand(x.size(0), 1, -1)], dim=1)                    # (n, K + 1, pe_embd)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, last_only=True)              # only [CLS] is read, so only [CLS] asks
        e = self.proj(self.ln(x[:, 0]))                                                 # (n, pe_embd)
        if self.head_norm:
            # ours: the same length in each head, so that a dot product says how near, and nothing else.
            e = self.head_norm * F.normalize(e.unflatten(-1, (self.n_head, -1)), dim=-1)
        return e.reshape(*positions.shape[:-1], self.pe_embd)


# ---- 4. Start shifting: training sequences are moved to far positions -------------------------------------

def place_windows(shape, n_moved, max_position, max_pieces=4):
    """The training window at n_moved random places, and then as it is: (n_moved + 1, T, n_dim) positions.
    shape: the window's, (T,) or (h, w). The paper moves it as a whole (max_pieces=1), to one of 320 places
    drawn once. ours: drawn each time, and each axis is torn at random into 1 to max_pieces pieces, for long
    distances in a short window (PoSE, Zhu et al. 2024): 0 1 2 | 3 4 becomes 17 18 19 | 805 806.
    """
    if max(shape) > max_position:
        raise ValueError(f"a window of {tuple(shape)} does not fit into max_position={max_position}")
    plain = window(shape)                                                       # (T, n_dim)
    n_pieces = torch.randint(1, max_pieces + 1, (n_moved, 1, 1))
    used = torch.arange(max_pieces).view(-1, 1) < n_pieces                      # (n_moved, max_pieces, 1)
    # An offset moves a piece. Sorted offsets keep positions increasing; those of unused pieces come last.
    offsets = [torch.randint(max_position - size + 1, (n_moved, max_pieces)) for size in shape]
    offsets = torch.stack(offsets, dim=-1).masked_fill(~used, max_position)
    offsets = offsets.sort(dim=1).values                                        # (n_moved, max_pieces, n_dim)
    # All pieces but the first begin at a cut. A position's piece is how many cuts it is past, in any order.
    cuts = torch.rand(n_moved, max_pieces - 1, len(shape)) * torch.tensor(shape)
    is_after = plain.unsqueeze(1) >= cuts.unsqueeze(1)                          # (n_moved, T, cuts, n_dim)
    piece = (is_after & used[:, None, 1:]).sum(2)                               # (n_moved, T, n_dim)
    return torch.cat([plain + offsets.gather(1, piece), plain.unsqueeze(0)])


def training_windows(shape, n_sequences, max_position, n_moved=4, max_pieces=4):
    """Positions for a training step: windows (n_moved + 1, T, n_dim), and which of them each sequence has.
    ours: of eight sequences n_moved have a moved window each, the others the plain one, 0 to T - 1. The next
    eight reuse these, as every window costs time. The paper: in a random tenth of the steps all 32 texts of a
    GPU move, to 16 of its 320 places; these steps are without L_OOD, which ours has in every one.
    """
    windows = place_windows(shape, n_moved, max_position, max_pieces)
    which = torch.randperm(8).clamp(max=n_moved)        # 0 1 2 3 4 4 4 4, shuffled
    return windows, which[torch.arange(n_sequences) % 8]


def count_channels(windows, head_dim):
    """ours: for queries after a gap, the keys before it count for the skipped ones, too. A piece of 32 keys
    before a gap of 968 stands for 1,000: log(1000 / 32) is added to the logit of each (sampled softmax).

    Else heads that look far would meet only T keys in training, and drown among thousands later. But a head
    that looks for one key would see it as if 31 times, where a long text has it once: so each window draws
    which share of its logs is added, from 0 to 1. Windows (B, T, 1) -> channels (B, 2, 1, T, 8), for eq
    and ek, whose dot product adds the log: channel r is 1 for queries after piece r, the log for its keys.
    """
    skipped = (windows.diff(dim=1) - 1).clamp(min=0)                    # (B, T - 1, 1): 0 0 968 0 ...
    piece = F.pad(skipped > 0, (0, 0, 1, 0)).cumsum(1)                  # (B, T, 1):     0 0 0 1 1 ...
    channel = torch.arange(8, device=windows.device)    # for up to 9 pieces; GPUs like multiples of 8
    is_own, is_later = piece == channel, piece > channel                # (B, T, 8)
    gap = (is_own * F.pad(skipped, (0, 0, 0, 1))).sum(1, keepdim=True)  # (B, 1, 8), after each piece
    n_keys = is_own.sum(1, keepdim=True).clamp(min=1)                   # at least 1, where there is no piece
    share = torch.rand(len(windows), 1, 1, device=windows.device)
    log_count = share * (1 + gap.float() / n_keys).log() * head_dim ** 0.5      # attend divides by sqrt(D)
    return torch.stack([is_later.float(), is_own * log_count], dim=1).unsqueeze(2)


# ---- 5. The two extra losses ------------------------------------------------------------------------------

def contrastive_loss(e, positions, n_head, paper=False):
    """L_delta: near positions get similar embeddings. In a group, which is a pivot i and its candidates, the
    candidate nearest to i, called c, has to be found:

        L_delta = mean over pivots i of  - log( exp(e_i . e_c) / sum_j exp(e_i . e_j) )

    Not among the j: i itself, duplicates of i or c, and (ours, always:) others exactly as near as c.
    e: (P, N, E), the embeddings of P groups of positions (P, N, n_dim) -> scalar. In the paper the first of a
    group is its pivot, and e is not split into heads. ours: each is pivot in turn, for each head; the mean.
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
    target = nearest.transpose(1, 2).expand(-1, n_head, -1)                             # (P, H, n_pivots)
    return F.cross_entropy(logits.flatten(0, 2), target.flatten())


def sample_groups(encoder, n_groups, n_candidates, paper=False):
    """Groups for L_delta, a pivot and then its M candidates: positions (P, 1 + M, n_dim).

    A decoy (hard negative) is written much like the pivot, but lies farther away than the nearest plain
    candidate. A group's candidates are drawn in one of three ways, which have these shares:

        way      candidates                                         paper: text    images    ours
        plain    from all positions                                        0       0.5       0.2
        hard     plain, but a quarter (images: a fifth) are decoys         0.4     0.3       0
        box      from a small box: close numbers are told apart            0.6     0.2       0.8

    The paper's box has 256 or 17 x 17 positions, and is mostly far from the pivot. ours: it is around the
    pivot and mostly small, as plain candidates hardly teach a distance of 1: of 32 drawn below 2,048 the
    nearest is about 32 away. ours, always: the box of images is 16 x 16; and positions may repeat.
    """
    n_dim, max_position = encoder.n_dim, encoder.max_position
    pivots = torch.randint(max_position, (n_groups, 1, n_dim))
    plain = torch.randint(max_position, (n_groups, n_candidates, n_dim))
    if paper:
        size = min(round(256 ** (1 / n_dim)), max_position)
        start = (torch.rand(n_groups, 1, n_dim) * (max_position - size + 1)).long()
    else:       # size 4 to max_position, the small ones likeliest
        size = (4 * (max_position / 4) ** torch.rand(n_groups, 1, 1).square()).long()
        start = pivots - (torch.rand(n_groups, 1, n_dim) * size).long()
        start = start.clamp(min=0).minimum(max_position - size)
    box = (start + (torch.rand(plain.shape) * size).long()).clamp(max=max_position - 1)     # float rounding
    way = torch.rand(n_groups, 1, 1)
    if not paper:
        return torch.cat([pivots, torch.where(way < 0.2, plain, box)], dim=1)
    n_decoys = n_candidates // (4 if n_dim == 1 else 5)
    replaced, kept = plain[:, :n_decoys], plain[:, n_decoys:]
    decoys = sample_hard_negatives(encoder, pivots.squeeze(1), n_decoys)                # (P, n_decoys, n_dim)
    distance = (kept - pivots).pow(2).sum(-1, keepdim=True)                             # (P, M - n_decoys, 1)
    least = distance.masked_fill(distance == 0, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    is_decoy = (decoys - pivots).pow(2).sum(-1, keepdim=True) > least                   # (P, n_decoys, 1)
    is_decoy = is_decoy & (decoys < max_position).all(-1, keepdim=True)
    hard = torch.cat([torch.where(is_decoy, decoys, replaced), kept], dim=1)
    below_plain, below_hard = (0.0, 0.4) if n_dim == 1 else (0.5, 0.8)
    candidates = torch.where(way < below_plain, plain, torch.where(way < below_hard, hard, box))
    return torch.cat([pivots, candidates], dim=1)


def sample_hard_negatives(encoder, pivots, n_negatives):
    """Positions written much like a pivot: 1 to 3 random edits of 4 kinds. At the third place of 5 6 7 8 9:

        insert a 3           6 7 3 8 9      digits up to there move left, the first drops out
        delete the 7         0 5 6 8 9      digits before it move right, a zero comes in front
        swap it with the 6   5 7 6 8 9      or with any other
        replace it by a 3    5 6 3 8 9      or by any other digit

    (P, n_dim) -> (P, n_negatives, n_dim). ours, always: all K digits are edited, as one row; the paper edits
    the number without zeros in front, two coordinates joined to one, and cut anywhere after. sample_groups
    drops what is past the limit, the paper draws that again: of 8 for text about 4 stay, in the paper 6.
    """
    digits = position_to_digits(pivots, encoder.n_digits)                               # (P, K)
    digits = digits.unsqueeze(1).repeat(1, n_negatives, 1)                              # (P, n_negatives, K)
    K = digits.size(-1)
    here = torch.arange(K)
    draw = lambda n: torch.randint(n, (*digits.shape[:-1], 1))      # (P, n_negatives, 1) numbers below n
    n_edits = 1 + draw(3)
    for i in range(3):
        kind, at, other = draw(4), draw(K), draw(K)
        digit_at, digit_other = digits.gather(-1, at), digits.gather(-1, other)
        replace = digits.scatter(-1, at, (digit_at + 1 + draw(9)) % 10)
        insert = torch.where(here < at, digits.roll(-1, -1), digits).scatter(-1, at, draw(10))
        delete = torch.where(here <= at, F.pad(digits, (1, -1)), digits)
        swap = digits.scatter(-1, at, digit_other).scatter(-1, other, digit_at)
        edited = torch.stack([insert, delete, swap, replace])                       # (4, P, n_negatives, K)
        edited = edited.take_along_dim(kind.unsqueeze(0), dim=0).squeeze(0)
        digits = torch.where(i < n_edits, edited, digits)
    place_values = 10 ** torch.arange(encoder.n_digits - 1, -1, -1)                     # back to numbers
    return (digits.unflatten(-1, (encoder.n_dim, -1)) * place_values).sum(-1)


def distillation_loss(e, n_head, paper=False):
    """L_OOD: a window elsewhere (student) gets the inner geometry of the training window (teacher).

        t_ij = softmax over j of e_i . e_j  for m positions of the teacher, s_ij for those of a student
        L_OOD = mean over rows i of  sum_j (t_ij - s_ij) (log t_ij - log s_ij)  =  KL(t_i, s_i) + KL(s_i, t_i)

    e: (n_students + 1, m, E), the last the teacher's, without gradient -> scalar. As in the paper it is
    the mean over students and heads, too. ours: the sum over j, as in a KL; theirs, a mean, is m times less.
    """
    e = e.unflatten(-1, (n_head, -1)).transpose(1, 2)                           # (n_students + 1, H, m, E/H)
    logs = F.log_softmax(e @ e.transpose(-2, -1), dim=-1)                       # (n_students + 1, H, m, m)
    students, teacher = logs[:-1], logs[-1:].detach()
    rows = ((teacher.exp() - students.exp()) * (teacher - students)).sum(-1)        # (n_students, H, m)
    return rows.mean() / (rows.size(-1) if paper else 1)


# ---- 6. Position encodings: positions in, Signals out -----------------------------------------------------

class PositionEncoding(nn.Module):
    """positions (T, n_dim) or (B, T, n_dim) -> a list of Signals: one for each layer, or one for all of them.
    This one is nope: no encoding. n_head, head_dim: H and D of the model's attention. shape: the training
    window's, (T,) or (h, w), which training moves to places below max_position. class_token: signals have a
    row for it, in front.
    """

    def __init__(self, n_head, head_dim, shape, max_position, n_layer=1, class_token=False):
        super().__init__()
        self.n_head, self.head_dim, self.n_layer, self.class_token = n_head, head_dim, n_layer, class_token
        self.shape, self.n_dim, self.max_position = tuple(shape), len(shape), max_position
        self.n_embd = n_head * head_dim

    def forward(self, positions, which=None, count=False):
        """which: (B,), for B sequences that share windows: sequence b has positions[which[b]].
        count: for torn windows, whose keys count for the gaps, too (count_channels).
        """
        if positions.dim() not in ((2, 3) if which is None else (3,)) or positions.size(-1) != self.n_dim:
            raise ValueError(f"positions must be (..., T, {self.n_dim}), got {tuple(positions.shape)}")
        signals = self.signals(positions)
        if count:
            counts = count_channels(positions, self.head_dim).expand(-1, -1, self.n_head, -1, -1)
            signals = [signal._replace(extend=counts if signal.extend is None else torch.cat(
                [signal.extend, counts.to(signal.extend)], dim=-1)) for signal in signals]
        if which is not None:
            signals = [Signal(*(t if t is None else t[which] for t in signal)) for signal in signals]
        return signals

    def signals(self, positions):
        return [Signal()]

    def interpolate(self, shape):
        """ours: signals of another window, its positions scaled into the training one's."""
        return self((window(shape).float() + 0.5) * torch.tensor(self.shape) / torch.tensor(shape) - 0.5)


class RoPE(PositionEncoding):
    """Su et al. 2021; for images Heo et al. 2024: a pair of channels is turned by frequency * coordinate."""

    def frequency(self, device):
        """(1, 1, n_dim, D/2), or of each layer and head (n_layer, H, ...). In float32, as angles need it."""
        n_pairs, rest = divmod(self.head_dim, 2 * self.n_dim)       # pairs that each coordinate turns
        if rest:
            raise ValueError(f"rope needs n_embd / n_head={self.head_dim} divisible by {2 * self.n_dim}")
        theta = 10000.0 if self.n_dim == 1 else 100.0
        of_one = theta ** (-torch.arange(n_pairs, dtype=torch.float32, device=device) / n_pairs)
        return torch.block_diag(*[of_one] * self.n_dim)[None, None]

    def signals(self, positions):
        frequency = self.frequency(positions.device)
        positions, signals = positions.to(frequency.device, torch.float32), []
        for layer in frequency:         # (H or 1, n_dim, D/2)
            # A sum of products: autocast would round the angles of a matrix product to 8 bits.
            angle = sum(positions[..., None, :, i, None] * layer[:, None, i] for i in range(self.n_dim))
            angle = F.pad(angle, (0, 0, int(self.class_token), 0))      # a class token is not turned
            signals.append(Signal(rotate=torch.stack([angle.cos(), angle.sin()], dim=-4)))
        return signals                  # rotate: (..., 2, H or 1, T, D/2)


class ALiBi(PositionEncoding):
    """Press et al. 2022, for text alone: the logit falls with distance, - slope_h * (i - j).
    ours: as in Press et al., it is not divided by sqrt(D); the authors' code divides it. Under a softmax
    -slope * i, the same for a whole row, cancels; slope * j is left, a dot product, too. ours: j is split in
    two, 256 * a + b, so that bfloat16 holds both parts exactly below 65,536.
    """

    def signals(self, positions):
        if self.n_dim != 1 or self.class_token:
            raise ValueError("alibi is for text: positions of one coordinate, and no class token")
        # 1/4 1/16 1/64 1/256 for 4 heads. Of six heads the last two have 1/2 and 1/8.
        power, h = 2 ** int(math.log2(self.n_head)), torch.arange(self.n_head, device=positions.device)
        exponent = torch.where(h < power, h + 1, h - power + 0.5) * 8 / power
        slope = 2.0 ** -exponent.float() * self.head_dim ** 0.5         # attend divides by sqrt(D)
        j = torch.cat([positions - positions % 256, positions % 256], dim=-1).float().unsqueeze(-3)
        extend = torch.stack(torch.broadcast_tensors(slope.view(-1, 1, 1), j), dim=-4)  # (..., 2, H, T, 2)
        return [Signal(extend=extend)]


class EmbeddingPE(PositionEncoding):
    """Encodings that make a vector e of each position. Subclasses have embed: (..., T, n_dim) -> (..., T, E).
    In most, e is added to the tokens, x_i + e_i, once, before the first layer.
    """

    def __init__(self, *args, size=None, **kwargs):
        super().__init__(*args, **kwargs)
        # A class token is not in the grid: it learns a vector.
        self.cls = nn.Parameter(torch.randn(size or self.n_embd) * 0.02) if self.class_token else None

    def signals(self, positions, interpolated=None):
        e = self.embed(positions) if interpolated is None else interpolated     # (..., T, E)
        if self.cls is not None:
            e = torch.cat([self.cls.expand(*e.shape[:-2], 1, -1), e], dim=-2)
        return self.fuse(e)

    def fuse(self, e):
        return [Signal(input=e)] + [Signal()] * (self.n_layer - 1)

    def interpolate(self, shape):
        """The training window's embeddings are resized (in the authors' code, for text, only a table's)."""
        grid = self.embed(window(self.shape)).T.unflatten(-1, self.shape).unsqueeze(0)  # (1, E, *self.shape)
        grid = F.interpolate(grid, size=tuple(shape), mode=("linear", "bicubic", "trilinear")[self.n_dim - 1])
        return self.signals(None, interpolated=grid.flatten(2)[0].T)


class LearnedPE(EmbeddingPE):
    """A table with a vector for each position below max_position. Beyond, it can only be interpolated."""

    def __init__(self, n_head, head_dim, shape, max_position, *args, **kwargs):
        table = torch.randn(*[max_position] * len(shape), n_head * head_dim) * 0.02
        super().__init__(n_head, head_dim, shape, max_position, *args, **kwargs)
        self.table = nn.Parameter(table)

    def embed(self, positions):
        index = positions.masked_fill(positions < 0, self.max_position)     # IndexError, as beyond the table
        return self.table[index.unbind(-1)]


class SinusoidalPE(EmbeddingPE):
    """Vaswani et al. 2017. ours: each dimension has its share of channels; and a learned gain, 0.1 at first,
    as tokens start at 0.02 and would be lost beside sines of 1.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_pairs, rest = divmod(self.n_embd, 2 * self.n_dim)
        if rest:
            raise ValueError(f"sinusoidal needs n_embd={self.n_embd} divisible by {2 * self.n_dim}")
        self.input_gain = nn.Parameter(torch.tensor(0.1))

    def embed(self, positions):
        pair = torch.arange(self.n_pairs, dtype=torch.float32, device=self.input_gain.device)
        angle = positions.to(pair.device).unsqueeze(-1) * 10000.0 ** (-pair / self.n_pairs)
        return self.input_gain * torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class SequentialPE(EmbeddingPE):
    """SeqPE. There are two ways for e_p to enter attention, called fusion, with [eq, ek] = W e_p + b:

        scalar  a number, eq_i . ek_j, is added to q_i . k_j; one W for all layers
        mul     q_i * eq_i and k_j * ek_j, a W for each layer

    These are the authors', scalar for text and mul for images; q_i + eq_i and k_j + ek_j they have, too.
    There e_p is as wide as the model, and W starts at N(0, 0.02), as here with diagonal_maps=False. ours: for
    mul W starts as the identity; for scalar as a diagonal, and a head starts with g * e_i . e_j added to its
    logits. L_delta makes e_i . e_j fall with distance; g is 1 in the first head and 1/64 in the last of four:
    some look nearby, some everywhere. ours: head_norm; and for scalar a narrow e_p, as attention pays for it.
    """

    def __init__(self, n_head, head_dim, shape, max_position, n_layer=1, class_token=False, fusion="scalar",
                 pe_embd=None, head_norm=6.0, diagonal_maps=True, pe_dropout=0.0):
        size = (pe_embd or 8 * n_head) if fusion == "scalar" else n_head * head_dim     # E
        super().__init__(n_head, head_dim, shape, max_position, n_layer, class_token, size=size)
        self.encoder = SeqPE(size, n_head, n_dim=self.n_dim, max_position=max_position, dropout=pe_dropout,
                             head_norm=head_norm)
        self.field, n_maps = {"scalar": ("extend", 1), "mul": ("mul", n_layer)}[fusion]     # of Signal
        self.maps = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(n_maps))
        self.diagonal_maps = diagonal_maps
        self.reset_parameters()

    def reset_parameters(self):
        self.encoder.apply(_init_weights)
        if self.cls is not None:        # ours: with head_norm it starts at about the size of e_p's channels
            nn.init.normal_(self.cls, std=1.0 if self.encoder.head_norm else 0.02)
        g = 2.0 ** (-8 * torch.arange(self.n_head) / self.n_head)               # one for each head
        # A root, as W makes queries and keys; and attend divides by sqrt(D).
        diagonal = (g * self.head_dim ** 0.5).sqrt() if self.field == "extend" else torch.ones(self.n_head)
        for W in self.maps:
            _init_weights(W)
            if self.diagonal_maps:
                each = diagonal.repeat_interleave(W.in_features // self.n_head)                        # (E,)
                W.weight.data.copy_(each.diag().repeat(2, 1))

    def embed(self, positions):
        return self.encoder(positions)

    def fuse(self, e):
        # W e: (..., T, 2 * E), for queries and for keys -> (..., 2, H, T, E/H)
        heads = [W(e).unflatten(-1, (2, self.n_head, -1)).movedim(-4, -2) for W in self.maps]
        return [Signal(**{self.field: each}) for each in heads]

    def loss(self, contrast_weight=0.1, distill_weight=0.1, n_groups=4, paper=False):
        """contrast_weight * L_delta + distill_weight * L_OOD, with the paper's weights: to be added to the
        model's loss once for each update. ours, always: students start anywhere, in the paper past T / 4
        (images: past the grid); and all are compared at the same m of T places, in the paper each at its own.
        """
        n_candidates, n_students, m = 32, 4, 32     # ours, as are 4 groups
        if paper:       # its numbers for each GPU; n_groups is not used
            n_groups, n_candidates, n_students, m = (16, 32, 16, 32) if self.n_dim == 1 else (32, 64, 32, 64)
        groups = sample_groups(self.encoder, n_groups, n_candidates, paper)             # (P, 1 + M, n_dim)
        windows = place_windows(self.shape, n_students, self.max_position, max_pieces=1)
        windows = windows[:, torch.randperm(windows.size(1))[:m]]           # (n_students + 1, m, n_dim)
        # All are read in one call, as in the paper: on a GPU that halves the number of kernels to start.
        e = self.encoder(torch.cat([groups.flatten(0, 1), windows.flatten(0, 1)]))
        n = groups[..., 0].numel()
        near = contrastive_loss(e[:n].view(*groups.shape[:2], -1), groups.to(e.device), self.n_head, paper)
        far = distillation_loss(e[n:].view(*windows.shape[:2], -1), self.n_head, paper)
        return contrast_weight * near + distill_weight * far

    def pretrain(self, steps=1000, progress=iter):
        """ours, all of it: a short training cannot order all positions, so they are ordered before it.
        All weights are drawn anew first, whatever a host's own initialisation or loading has left in them.
        """
        self.reset_parameters()
        optimizer = torch.optim.AdamW(self.encoder.parameters(), betas=(0.9, 0.95))
        for step in progress(range(steps)):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            loss = self.loss(contrast_weight=1.0, n_groups=16)
            first = loss.item() if step == 0 else first
            loss.backward()
            nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if steps >= 100 and not loss < first:       # true of nan, too
            raise ValueError(f"the encoder learns nothing: its loss was {first:.3f} and is {loss:.3f}")

    def for_training(self, n_sequences, count=True):
        """For another model, fusion "scalar": eq, ek (B, H, T, E/H, + 8 if counted), drawn anew each time."""
        n_moved, max_pieces = (4, 4) if self.n_dim == 1 else (2, 8)     # best on our texts, and our images
        windows, which = training_windows(self.shape, n_sequences, self.max_position, n_moved, max_pieces)
        return self(windows, which, count and self.n_dim == 1)[0].extend.unbind(-4)

    def for_reading(self, *shape):
        """For another model: eq, ek (H, T, E/H) of all positions from 0 on, of (T,) or (h, w)."""
        return self(window(shape))[0].extend.unbind(-4)


ENCODINGS = {"seqpe": SequentialPE, "rope": RoPE, "alibi": ALiBi, "learned": LearnedPE,
             "sinusoidal": SinusoidalPE, "nope": PositionEncoding}


# ---- 7. The model -----------------------------------------------------------------------------------------

class Transformer(nn.Module):
    """Blocks with a position encoding, for GPT and train_vit.py's ViT. ours: the sizes, no dropout.
    shape: the training window's. pe: a key of ENCODINGS; what follows is for the encoding.
    """

    def __init__(self, shape, causal, n_layer=4, n_head=4, n_embd=128, pe="seqpe", max_position=2048,
                 **kwargs):
        super().__init__()
        self.shape, self.encoding = shape, pe
        self.blocks = nn.ModuleList(Block(n_embd, n_head, causal) for _ in range(n_layer))
        self.ln = nn.LayerNorm(n_embd)
        self.apply(_init_weights)
        for block in self.blocks:       # GPT-2: the residual stream's variance does not grow with depth
            for layer in (block.attn.proj, block.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * n_layer))
        self.pe = ENCODINGS[pe](n_head, n_embd // n_head, shape, max_position, n_layer,
                                class_token=not causal, **kwargs)

    def transform(self, x, signals):
        """Token embeddings x (B, T, C) through all the blocks, with a Signal for each, or one for all."""
        signals = signals * len(self.blocks) if len(signals) == 1 else signals
        for block, signal in zip(self.blocks, signals, strict=True):
            B, T, _ = x.shape
            x = block(x, signal)        # a signal that does not fit may broadcast
            if x.size(0) != B or any(t is not None and t.size(-2) != T for t in signal):
                raise ValueError(f"the signals are not of the positions of {B} sequences of {T} tokens")
        return self.ln(x)


class GPT(Transformer):
    """A language model in the manner of nanoGPT. block_size: the training length in tokens, not a limit."""

    def __init__(self, vocab_size, block_size=128, n_embd=128, **kwargs):
        super().__init__((block_size,), causal=True, n_embd=n_embd, **kwargs)
        self.tokens = nn.Embedding(vocab_size, n_embd)
        nn.init.normal_(self.tokens.weight, std=0.02)       # also the output layer's weights

    def forward(self, idx, targets=None, signals=None):
        """idx: (B, T) tokens -> logits (B, T, vocab_size) and, with targets (B, T), the mean loss in nats.
        signals: model.pe(positions), or other such; by default those of positions 0 to T - 1.
        """
        signals = self.pe(window(idx.shape[1:])) if signals is None else signals
        logits = F.linear(self.transform(self.tokens(idx), signals), self.tokens.weight)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# A training step on idx and targets (32, 128), after model.pe.pretrain():
#     windows, which = training_windows((128,), 32, model.pe.max_position)
#     signals = model.pe(windows, which, count=True)
#     loss = model(idx, targets, signals)[1] + model.pe.loss()

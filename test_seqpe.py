"""The tests: the arithmetic of seqpe.py against slow loops in float64, what is promised of it, and the path
of tensors between host and GPU, for which no GPU is needed; then the scripts as a user runs them, interrupts
them and mistypes them; then what the README says.
"""

import copy
import errno
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seqpe
import train_lm
import train_vit
from seqpe import (ENCODINGS, GPT, Attention, GPTConfig, PositionEncoding, SeqPE, Signal,
                   contrastive_loss, count_bias, digits_to_position, distillation_loss, place_windows,
                   position_regularizers, position_to_digits, sample_groups, sample_hard_negatives, warm_up,
                   window)
from train_vit import ViT, ViTConfig

BOTH = ["seqpe-scalar", "seqpe-mul", "seqpe-add", "seqpe-input", "rope", "sinusoidal", "learned", "nope"]
TEXT, IMAGE = [*BOTH, "alibi", "relative"], [*BOTH, "rope_mixed"]


class Relative(PositionEncoding):
    """An encoding of one's own that is a matrix, as T5's is: bias[i, j] = (layer + head) sin((i - j) / 4)."""

    def forward(self, positions):
        distance = positions - positions.transpose(-2, -1)                  # (T, T) or (B, T, T)
        wave = (distance.double() / 4).sin().unsqueeze(-3)
        heads = range(1, self.config.n_head + 1)
        return [Signal(bias=torch.cat([(layer + head) * wave for head in heads], dim=-3))
                for layer in range(self.config.n_layer)]


@pytest.fixture(autouse=True)
def an_encoding_of_ones_own(monkeypatch):
    monkeypatch.setitem(ENCODINGS, "relative", Relative)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def tokens(*shape, vocab_size=11, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def gpt(encoding="seqpe-scalar", **settings):
    """A small GPT as it starts, for a window of 8 tokens. encoding: "seqpe-mul" is fusion="mul", too."""
    pe, _, fusion = encoding.partition("-")
    sizes = dict(n_layer=2, n_head=2, n_embd=16, max_position=1000, block_size=8, vocab_size=11)
    return GPT(GPTConfig(pe=pe, fusion=fusion or "scalar", **{**sizes, **settings}))


def vit(encoding="seqpe-scalar", **settings):
    """A small ViT as it starts, for 8 by 8 pixels: a grid of 4 by 4 patches."""
    pe, _, fusion = encoding.partition("-")
    sizes = dict(n_layer=2, n_head=2, n_embd=16, max_position=100, image_size=8, patch_size=2, n_channels=2,
                 n_classes=5)
    return ViT(ViTConfig(pe=pe, fusion=fusion or "scalar", **{**sizes, **settings}))


def randomized(make, *args, seed=0, **settings):
    """make(...) in float64, every parameter moved: biases of 0 and gains of 1 would hide mistakes."""
    torch.manual_seed(seed)
    module, generator = make(*args, **settings).double(), seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def make_encoder(n_dim=1, n_embd=16, n_head=2, max_position=125, base=5, **settings):
    return randomized(SeqPE, n_embd, n_head, n_dim=n_dim, max_position=max_position, base=base, **settings)


make_gpt, make_vit = partial(randomized, gpt), partial(randomized, vit)


def check_gradients(loss, module):
    """Every parameter gets a gradient, a finite one that is not zero."""
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


# ------------------------------------------------------------------------------------------------------------
# Digits, and the encoder that reads them


def slow_digits(number, n_digits, base):
    digits = []
    for _ in range(n_digits):
        number, digit = divmod(number, base)
        digits.insert(0, digit)
    return digits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("base", [2, 3, 7, 10, 36])
def test_digits_equal_pythons_arithmetic(base, dtype):
    assert position_to_digits(torch.tensor([2, 13]), n_digits=2).tolist() == [0, 2, 1, 3]   # as in the paper
    draw = random.Random(base)
    most = max(n for n in range(1, 64) if base ** n <= 2 ** 63)
    for n_dim, lead, n_digits in itertools.product((1, 2, 3), [(), (3,), (2, 0), (2, 1, 2)], (1, 4, most)):
        limit = min(base ** n_digits, torch.iinfo(dtype).max + 1)
        numbers = [draw.choice([0, limit - 1, draw.randrange(limit) >> draw.randrange(63)])  # of every length
                   for _ in range(math.prod(lead) * n_dim)]
        positions = torch.tensor(numbers, dtype=dtype).view(*lead, n_dim)
        digits = position_to_digits(positions, n_digits, base)
        assert digits.shape == (*lead, n_dim * n_digits) and not digits.is_floating_point()
        assert digits.flatten().tolist() == sum((slow_digits(n, n_digits, base) for n in numbers), [])
        back = digits_to_position(digits, n_digits, base)
        assert back.shape == positions.shape and back.flatten().tolist() == numbers


def slow_linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def slow_layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    scale = weights[name + ".weight"] / torch.sqrt((centred ** 2).mean(-1, keepdim=True) + 1e-5)
    return centred * scale + weights[name + ".bias"]


def slow_attention(x, weights, name, causal, n_head, logit=None):
    """Over one sequence x (T, C), pair by pair; logit(head, q_i, k_j, i, j) if it is not the plain one."""
    (T, C), heads = x.shape, []
    q, k_v = slow_linear(x, weights, name + "query"), slow_linear(x, weights, name + "key_value")
    for head, c in enumerate(torch.arange(C).chunk(n_head)):
        q_h, k_h, v_h = q[:, c], k_v[:, c], k_v[:, C + c]
        logits = torch.full((T, T), -math.inf, dtype=torch.float64)
        for i in range(T):
            for j in range(i + 1 if causal else T):
                plain = q_h[i] @ k_h[j] / math.sqrt(C / n_head)
                logits[i, j] = logit(head, q_h[i], k_h[j], i, j) if logit else plain
        heads.append(logits.exp() / logits.exp().sum(-1, keepdim=True) @ v_h)
    return slow_linear(torch.cat(heads, dim=-1), weights, name + "proj")


def slow_block(x, weights, name, causal, approximate="none"):
    """A pre-norm layer of two heads over one sequence x (T, C), every symbol asking."""
    h = slow_layer_norm(x, weights, name + ".ln_1")
    x = x + slow_attention(h, weights, name + ".attn.", causal, n_head=2)
    h = slow_linear(slow_layer_norm(x, weights, name + ".ln_2"), weights, name + ".mlp.0")
    return x + slow_linear(F.gelu(h, approximate=approximate), weights, name + ".mlp.2")


def slow_encoder(encoder, positions):
    """e_p of positions (n, n_dim), one by one: the paper's arithmetic, all symbols in every layer."""
    weights, embeddings = encoder.state_dict(), []
    for position in positions.tolist():
        rows = []
        for dimension, number in enumerate(position):
            for place, digit in enumerate(slow_digits(number, encoder.n_digits, encoder.base)):
                row = weights["symbol.weight"][digit] + weights["place.weight"][place]
                rows.append(row + weights["dimension.weight"][dimension] if len(position) > 1 else row)
        x = torch.stack([*rows, weights["cls"]])
        for layer in range(len(encoder.blocks)):
            x = slow_block(x, weights, f"blocks.{layer}", causal=True, approximate="tanh")
        e = slow_linear(slow_layer_norm(x, weights, "ln")[-1], weights, "proj")
        if encoder.norm is not None:
            e = torch.cat([encoder.norm * h / (h ** 2).sum().sqrt() for h in e.chunk(encoder.n_head)])
        embeddings.append(e)
    return torch.stack(embeddings)


@pytest.mark.parametrize("n_dim, settings", [
    (1, dict(max_position=20_000, base=10)), (1, dict(n_layer=1, norm=3.0)),
    (1, dict(n_layer=3, base=2, width=8)), (2, dict(base=3)), (2, dict(width=24, norm=0.5)), (3, {}),
])
def test_encoder_is_the_papers_transformer(n_dim, settings):
    """And nothing scales what comes out of it, unless by norm, which each head's length then is."""
    encoder = make_encoder(n_dim, **settings)
    positions = torch.randint(encoder.max_position, (12, n_dim), generator=seeded())
    e, slow = encoder(positions), slow_encoder(encoder, positions)
    assert_close(e, slow, rtol=0, atol=1e-10)
    assert slow.std(0).min() > 1e-3     # the positions do tell in every channel
    if encoder.norm:
        lengths = e.unflatten(-1, (encoder.n_head, -1)).norm(dim=-1)
        assert_close(lengths, torch.full_like(lengths, encoder.norm))
    check_gradients((e * randn(12, 16)).sum(), encoder)
    assert_close(encoder(positions.view(2, 3, 2, n_dim)), e.view(2, 3, 2, 16))
    assert encoder(positions.short()).equal(e) and encoder(positions, check=False).equal(e)
    assert encoder(positions[:0]).shape == (0, 16)      # generating nothing encodes an empty window


def check_first_weights(encoder):
    """N(0, 0.02); layer norms of 1, and biases of 0."""
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 1 and name != "cls":
            assert (parameter == (1 if "ln" in name and "weight" in name else 0)).all(), name
        else:
            within = 4 * 0.02 / math.sqrt(parameter.numel())
            assert abs(parameter.mean()) < within and abs(parameter.std() - 0.02) < within, name


@pytest.mark.parametrize("n_dim", [1, 2])
def test_seqpe_starts_as_the_paper_says(n_dim):
    """Also where it was made without memory, as large models are, and all its weights are drawn anew."""
    torch.manual_seed(0)
    plain = SeqPE(64, n_dim=n_dim)
    assert (plain.base, plain.max_position, plain.n_digits, plain.norm) == (10, 20_000, 5, None)
    assert plain.symbol.weight.shape == (10, 64) and len(plain.blocks) == 2
    with torch.device("meta"):
        encoder = SeqPE(64, n_dim=n_dim)
    encoder.to_empty(device="cpu")
    for tensor in itertools.chain(encoder.parameters(), encoder.buffers()):
        nn.init.constant_(tensor, math.nan)
    encoder.reset_parameters()
    for each in (plain, encoder):
        check_first_weights(each)
        e = each(window((12,) * n_dim))     # small as the weights are, all positions are told apart
        assert F.pdist(e.double()).min() > 1e-4


@pytest.mark.parametrize("settings, n_digits, max_position", [
    (dict(max_position=1000), 3, 1000), (dict(max_position=1001), 4, 1001), (dict(max_position=1), 1, 1),
    (dict(base=2), 15, 20_000), (dict(base=2, max_position=2 ** 30), 30, 2 ** 30),
    (dict(base=5, max_position=25), 2, 25), (dict(base=5, max_position=26), 3, 26),
    (dict(base=1000, max_position=2 ** 30), 4, 2 ** 30),
])
def test_limit_base_and_digits_go_together(settings, n_digits, max_position):
    encoder = SeqPE(8, **settings)
    assert (encoder.n_digits, encoder.max_position) == (n_digits, max_position)
    e = encoder(torch.tensor([[0], [max_position - 1]]))
    assert e.isfinite().all() and (max_position == 1 or not e[0].equal(e[1]))
    for wrong, named in ((max_position, f"0 to {max_position}"), (-1, "-1 to 0")):
        with pytest.raises(ValueError, match=f"positions {named} .*holds 0 to {max_position - 1};"):
            encoder(torch.tensor([[0], [wrong]]))


@pytest.mark.parametrize("n_dim", [1, 3])
def test_unchecked_positions_are_never_read_as_others(n_dim):
    """Below the limit of the digits they are what they are; past it there is an error, not another number."""
    encoder, inside = make_encoder(n_dim, max_position=700, base=10), torch.full((1, n_dim), 999)
    assert_close(encoder(inside, check=False), slow_encoder(encoder, inside))
    for wrong, dimension in itertools.product((1000, 2000, 123_456, 2 ** 62, -1, -1000), range(n_dim)):
        positions = torch.zeros(2, n_dim, dtype=torch.int64)
        positions[1, dimension] = wrong
        for check, error in ((False, IndexError), (True, ValueError)):
            with pytest.raises(error):
                encoder(positions, check)


# ------------------------------------------------------------------------------------------------------------
# The two regularisers, and start shifting


def single_edits(digits, base):
    """What a tuple of digits becomes by an edit, each result as often as it can be drawn."""
    for at in range(len(digits)):
        for new in range(base):
            yield (*digits[1:at + 1], new, *digits[at + 1:])
            yield (*digits[:at], new, *digits[at + 1:])
            yield (0, *digits[:at], *digits[at + 1:])
            yield (*digits[:at], *digits[at:at + 2][::-1], *digits[at + 2:])


def as_digits(positions, encoder):
    return list(map(tuple, position_to_digits(positions, encoder.n_digits, encoder.base).tolist()))


@pytest.mark.parametrize("n_dim, n_digits, pivot", [(1, 7, [12345]), (2, 3, [38, 109]), (1, 1, [3])])
def test_hard_negatives_are_one_to_three_edits_away(n_dim, n_digits, pivot):
    encoder, n_samples = SeqPE(8, n_dim=n_dim, base=5, max_position=5 ** n_digits), 40000
    pivots = torch.tensor([pivot, [0] * n_dim])
    found = sample_hard_negatives(encoder, pivots, n_samples, seeded())
    assert found[1].lt(5).all(-1).float().mean() > 1 / 4      # those of 0: zeros, and at most a single digit
    found, start = Counter(as_digits(found[0], encoder)), as_digits(pivots, encoder)[0]
    reached = [{start}]     # after 0, 1, 2, 3 edits
    for _ in range(3):
        reached.append({result for digits in reached[-1] for result in single_edits(digits, 5)})
    assert set(found) <= reached[3] and (n_digits == 1 or set(found) & (reached[3] - reached[2]))
    # A third are edited once, each edit as likely as any other; more edits can only add to these counts.
    once = Counter(single_edits(start, 5))
    assert all(found[each] > 0.6 * n_samples / 3 * ways / once.total() for each, ways in once.items())


@pytest.mark.parametrize("base, max_position", [(2, 2), (10, 7), (3, 130), (10, 20_000), (10, 2 ** 30)])
@pytest.mark.parametrize("paper", [False, True])
def test_candidates_can_be_reached_and_are_not_the_pivot(base, max_position, paper):
    for n_dim, n_candidates in ((1, 1), (1, 32), (2, 4), (3, 32)):
        encoder = SeqPE(8, n_dim=n_dim, base=base, max_position=max_position)
        groups = sample_groups(encoder, 300, n_candidates, paper, seeded())
        assert groups.shape == (300, 1 + n_candidates, n_dim)
        assert 0 <= groups.min() and groups.max() < max_position
        assert not (groups[:, 1:] == groups[:, :1]).all(-1).any()


@pytest.mark.parametrize("paper", [False, True])
def test_candidates_are_drawn_in_three_ways(paper):
    encoder = SeqPE(8, max_position=10 ** 7)
    groups = sample_groups(encoder, 2000, 32, paper, seeded())
    candidates = groups[:, 1:].squeeze(-1)
    extent = candidates.amax(1) - candidates.amin(1)
    # The share of a window below a size, small ones being the likeliest, times the share of windows.
    slow = {size: 0.7 * math.sqrt(math.log(size / 4) / math.log(10 ** 7 / 4)) for size in (64, 1000, 10 ** 5)}
    for size, share in ({200: 0.01, 256: 0.2, 10 ** 6: 0.2} if paper else slow).items():
        assert (extent < size).double().mean() == pytest.approx(share, abs=0.04)
    close = extent < (256 if paper else 10 ** 5)
    below = (candidates < groups[:, 0])[close].double()
    assert below.mean() == pytest.approx(0.5, abs=0.05) and below.mean(1).std() > 0.2     # anywhere around it
    assert candidates[~close].double().mean() == pytest.approx(0.5e7, rel=0.05)
    # A fifth of the 32 are hard negatives, a third of which are one edit away: .9 of such groups have one.
    hits = [sum(map(set(single_edits(pivot, 10)).__contains__, others))
            for pivot, *others in (as_digits(group, encoder) for group in groups[~close])]
    assert max(hits) <= 6
    assert sum(map(bool, hits)) / 2000 == pytest.approx(0.9 * (0.3 if paper else 0.1), abs=0.04)


@pytest.mark.parametrize("shape", [(64,), (12, 16), (2, 3, 4)])
@pytest.mark.parametrize("max_pieces", [1, 2, 4])
def test_windows_come_in_pieces_that_keep_their_order(shape, max_pieces):
    """Along each axis up to max_pieces of them, none before the last; all pieces together start anywhere."""
    assert list(map(tuple, window(shape).tolist())) == list(itertools.product(*map(range, shape)))
    windows = place_windows(shape, 800, 1000, max_pieces, seeded())
    assert windows.shape == (800, math.prod(shape), len(shape))
    assert 0 <= windows.min() < 20 and 980 < windows.max() < 1000
    for axis, size in enumerate(shape):
        places, starts = window(shape)[:, axis], {n: [] for n in range(1, max_pieces + 1)}
        for offset in (windows - window(shape))[..., axis]:
            by_place = [offset[places == place].unique().tolist() for place in range(size)]
            stairs = [value for (value,) in by_place]       # the same in all rows and columns
            assert stairs == sorted(stairs)
            starts[len(set(stairs))] += sorted(set(stairs))
        for n, each in starts.items() if size >= 12 else ():        # in a short one cuts fall together
            assert len(each) / n > 800 * 0.5 / max_pieces
            shares = torch.histc(torch.tensor(each).double(), 4, 0, 1000 - size) / len(each)
            assert shares.sub(0.25).abs().max() < 0.08, (n, shares)
    assert place_windows((9, 9), 3, 9, max_pieces, seeded()).equal(window((9, 9)).expand(3, -1, -1))


def slow_counts(positions):
    """The number of each position's piece, and what its key counts for: that piece's span / n."""
    gaps = (after > before + 1 for before, after in itertools.pairwise(positions))
    piece = list(itertools.accumulate(gaps, initial=0))
    start = [positions[piece.index(n)] for n in range(piece[-1] + 1)] + [positions[-1] + 1]
    return piece, [(start[n + 1] - start[n]) / piece.count(n) for n in piece]


def test_count_bias_equals_a_loop():
    torn = place_windows((12,), 40, 300, 4, seeded())
    bias = count_bias(torn, seeded(1))
    assert bias.shape == (40, 1, 12, 12)
    share = torch.rand(40, 1, generator=seeded(1)).squeeze(1).tolist()
    for matrix, positions, u in zip(bias.squeeze(1), torn.squeeze(-1).tolist(), share):
        piece, counts = slow_counts(positions)
        slow = [[u * math.log(counts[j]) if piece[j] < piece[i] else 0.0 for j in range(12)]
                for i in range(12)]
        assert_close(matrix.tril(), torch.tensor(slow))     # the keys that a query sees
    assert bias.amax((1, 2, 3)).gt(0.1).sum() > 15          # many windows are torn
    assert (count_bias(place_windows((12,), 5, 300, 1, seeded())) == 0).all()


def test_a_counted_key_is_as_many_keys(monkeypatch):
    """Attention over a torn window, counted in full, is attention over keys repeated span / n times."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **settings: torch.ones(*shape))
    positions = torch.tensor([2, 3, 6, 9, 10, 11, 15, 16])      # four pieces; the last is whole
    piece, counts = slow_counts(positions.tolist())
    assert counts == [2, 2, 3, 2, 2, 2, 1, 1]
    attn, x = randomized(Attention, 16, 2), randn(1, 8, 16)
    y = attn(x, Signal(bias=count_bias(positions.view(1, -1, 1))))
    for i in range(8):
        keys = [j for j in range(i + 1) for _ in range(int(counts[j]) if piece[j] < piece[i] else 1)]
        assert_close(y[:, i], attn(x[:, keys])[:, -1], rtol=0, atol=1e-6)
    assert (y - attn(x)).abs().max() > 0.01


@pytest.mark.parametrize("sample", [
    lambda encoder, g: sample_hard_negatives(encoder, torch.tensor([[13], [67]]), 9, g),
    lambda encoder, g: sample_groups(encoder, 5, 7, False, g),
    lambda encoder, g: sample_groups(encoder, 5, 7, True, g),
    lambda encoder, g: place_windows((8, 8), 3, 1000, generator=g),
    lambda encoder, g: count_bias(torch.tensor([[[0], [5]]]), g),
    lambda encoder, g: position_regularizers(encoder, (20,), generator=g),
])
def test_a_generator_decides_everything_and_leaves_torchs_own_alone(sample):
    encoder, state = make_encoder(), torch.get_rng_state()
    first, again, other = (sample(encoder, seeded(seed)) for seed in (3, 3, 4))
    assert first.equal(again) and not first.equal(other)
    assert torch.get_rng_state().equal(state)
    sample(encoder, None)
    assert not torch.get_rng_state().equal(state)


def slow_contrastive_loss(e, positions, n_head, n_pivots):
    """The nearest is not a copy, nor are its rivals, which are further away."""
    losses = []
    for e_group, group in zip(e, positions.tolist()):
        for i, pivot in enumerate(group[:n_pivots]):
            distance = [sum((a - b) ** 2 for a, b in zip(position, pivot)) for position in group]
            nearest = distance.index(min(d for d in distance if d))
            rivals = [j for j, d in enumerate(distance) if j == nearest or d > distance[nearest]]
            for e_head in e_group.chunk(n_head, dim=-1):
                logits = {j: float(e_head[i] @ e_head[j]) for j in rivals}
                losses.append(math.log(sum(map(math.exp, logits.values()))) - logits[nearest])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("n_head, n_pivots", [(1, 1), (3, 15), (2, 4)])
@pytest.mark.parametrize("n_dim, highest", [(1, 12), (2, 4), (3, 2 ** 30)])
def test_contrastive_loss_equals_a_loop(n_dim, highest, n_head, n_pivots):
    """The paper's, of one pivot and whole vectors, which is the default, and ours."""
    positions = torch.randint(highest, (6, 15, n_dim), generator=seeded())
    if highest > 100:       # rivals that only exact integers tell apart
        positions = highest - 1 - positions % 100
        positions[:, ::2] %= 100
    else:       # with copies of the pivot, and others as near as the nearest
        positions[0, :5] = torch.tensor([2, 2, 1, 3, 3]).unsqueeze(-1)
    e = randn(6, 15, 6).requires_grad_()
    loss = contrastive_loss(e, positions, n_head, n_pivots)
    slow = slow_contrastive_loss(e.detach(), positions, n_head, n_pivots)
    assert loss.shape == () and loss.item() == pytest.approx(slow)
    assert (n_head, n_pivots) != (1, 1) or contrastive_loss(e, positions).equal(loss)
    loss.backward()
    assert e.grad.isfinite().all()


def slow_distillation_loss(e_teacher, e_students, n_head):
    losses = []
    for student in e_students:
        for channels in torch.arange(e_teacher.size(-1)).chunk(n_head):
            t, s = (F.log_softmax(e[:, channels] @ e[:, channels].T, dim=-1) for e in (e_teacher, student))
            for t_i, s_i in zip(t, s):
                losses.append((t_i.exp() * (t_i - s_i)).sum() + (s_i.exp() * (s_i - t_i)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("n_head, m, n_students", [(1, 7, 3), (2, 2, 1), (4, 7, 2)])
def test_distillation_loss_equals_a_loop_and_teaches_only_the_students(n_head, m, n_students):
    e_teacher, e_students = randn(m, 8).requires_grad_(), randn(n_students, m, 8, seed=1).requires_grad_()
    loss = distillation_loss(e_teacher, e_students, n_head)
    assert loss.shape == () and loss > 1e-3
    assert_close(loss, slow_distillation_loss(e_teacher, e_students, n_head))
    loss.backward()
    assert e_teacher.grad is None
    assert e_students.grad.isfinite().all() and e_students.grad.count_nonzero() == e_students.numel()


@pytest.mark.parametrize("shape, paper", [((20,), False), ((20,), True), ((4, 5), False), ((2, 3, 4), True)])
@pytest.mark.parametrize("near_weight, far_weight", [(0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_position_regularizers_are_the_two_losses(shape, paper, near_weight, far_weight):
    encoder, read = make_encoder(len(shape), max_position=60), []
    encoder.register_forward_hook(lambda *_: read.append(1))
    loss = position_regularizers(encoder, shape, near_weight, far_weight, 6, 9, 2, 8, paper, seeded(7))
    assert len(read) == (near_weight > 0) + (far_weight > 0)    # a weight of zero costs nothing
    assert position_regularizers(encoder, shape, 0, 0) == 0
    generator, slow = seeded(7), 0.0
    if near_weight:
        groups = sample_groups(encoder, 6, 9, paper, generator)
        slow += near_weight * contrastive_loss(encoder(groups), groups, *((1, 1) if paper else (2, 10)))
    if far_weight:
        students = place_windows(shape, 2, 60, 1, generator)
        chosen = torch.randperm(math.prod(shape), generator=generator)[:8]
        slow += far_weight * distillation_loss(encoder(window(shape)[chosen]), encoder(students[:, chosen]),
                                               encoder.n_head)
    assert_close(loss, slow)
    check_gradients(loss, encoder)


@pytest.mark.parametrize("shape", [(16,), (4, 4)])
def test_warming_up_lowers_the_regularisers(shape):
    torch.manual_seed(0)
    encoder = SeqPE(16, 2, n_layer=1, n_dim=len(shape), max_position=30, norm=3.0)
    losses = []
    for _ in range(2):
        losses.append(position_regularizers(encoder, shape, 1.0, n_groups=64, generator=seeded(9)).item())
        warm_up(encoder, shape, 60, learning_rate=5e-3, generator=seeded())
    assert losses[1] < 0.9 * losses[0]
    assert all(parameter.grad is None for parameter in encoder.parameters())


# ------------------------------------------------------------------------------------------------------------
# Attention and the encodings


SOME = torch.tensor([[0], [3], [4], [9], [250], [260], [700]])
GRID = torch.tensor([[0, 0], [0, 3], [2, 1], [7, 5], [3, 9]])


def check_attention(model, positions, logit, atol=1e-10):
    """Each layer's attention under the model's signals is one with logit(layer, head, q_i, k_j, i, j)."""
    x, first = randn(len(positions), 16, seed=3), int(model.pe.class_token)
    for layer, (block, signal) in enumerate(zip(model.blocks, model.pe(positions), strict=True)):
        attn = block.attn
        slow = slow_attention(x, attn.state_dict(), "", attn.causal, attn.n_head, partial(logit, layer))
        fast = attn(x.unsqueeze(0), signal.at(slice(first, first + len(x)))).squeeze(0)
        assert_close(fast, slow, rtol=0, atol=atol)
        assert (fast - attn(x.unsqueeze(0))).abs().max() > 0.01      # the encoding has a say


@pytest.mark.parametrize("pe, n_head", [("alibi", 2), ("alibi", 8), ("relative", 2)])
def test_biases_of_attention(pe, n_head):
    model = make_gpt(pe, n_head=n_head)

    def logit(layer, head, q, k, i, j):
        distance = float(SOME[i] - SOME[j])
        if pe == "alibi":
            return q @ k / math.sqrt(16 / n_head) - 2 ** (-8 * (head + 1) / n_head) * distance
        return q @ k / math.sqrt(8) + (layer + head + 1) * math.sin(distance / 4)

    check_attention(model, SOME, logit, atol=1e-4)      # ALiBi's slopes are in float32


@pytest.mark.parametrize("make, positions", [(make_gpt, SOME), (make_vit, GRID)], ids=["GPT", "ViT"])
@pytest.mark.parametrize("fusion, settings", [("scalar", {}), ("mul", {}), ("add", {}),
                                              ("scalar", dict(pe_embd=6, pe_norm=3.0, base=7))])
def test_seqpe_enters_attention_as_the_paper_writes(make, positions, fusion, settings):
    model = make(f"seqpe-{fusion}", **settings)
    e = slow_encoder(model.encoder, positions)
    assert len(model.pe.maps) == (1 if fusion == "scalar" and make is make_gpt else 2)
    assert (e.size(-1), model.encoder.norm) == ((6, 3.0) if settings else (16, None))

    def logit(layer, head, q, k, i, j):
        W = model.pe.maps[layer % len(model.pe.maps)].weight.detach()
        e_q, e_k = ((W_end @ e[end]).chunk(2)[head] for W_end, end in zip(W.chunk(2), (i, j)))
        return {"scalar": lambda: q @ k + e_q @ e_k, "mul": lambda: (q * e_q) @ (k * e_k),
                "add": lambda: (q + e_q) @ (k + e_k)}[fusion]() / math.sqrt(8)

    check_attention(model, positions, logit)
    e, start = randn(5, e.size(-1)).float(), gpt if make is make_gpt else vit
    small, same = (start(f"seqpe-{fusion}", map_std=std, **settings).pe.maps for std in (0.05, 0))
    for small, same in zip(small, same):
        assert small.weight.std().item() == pytest.approx(0.05, rel=0.3)
        for head, gain in enumerate((1, 1 / 16)):       # eq . ek / sqrt(D) starts as gain * e_i . e_j
            e_h, e_q, e_k = (x.chunk(2, dim=-1)[head] for x in (e, *same(e).chunk(2, dim=-1)))
            if fusion == "mul":
                assert e_q.equal(e_h) and e_k.equal(e_h)
            else:
                assert_close(e_q @ e_k.T / math.sqrt(8), gain * e_h @ e_h.T)


def turned(x, angles):
    """RoPE as it is written: a 2 by 2 rotation matrix for the pair of channels (c, c + D/2)."""
    x, cos, sin = x.clone(), map(math.cos, angles), map(math.sin, angles)
    for c, (cos_c, sin_c) in enumerate(zip(cos, sin)):
        x[c::len(angles)] = torch.tensor([[cos_c, -sin_c], [sin_c, cos_c]]).double() @ x[c::len(angles)]
    return x


def slow_angles(model, layer, head, position):
    """The angles of the D/2 = 4 pairs at a position, a list of numbers."""
    if model.config.pe == "rope_mixed":      # pair c looks at both coordinates, at learned frequencies
        frequency = model.pe.learned[layer, head].tolist()
        return [sum(frequency[d][c] * p for d, p in enumerate(position)) for c in range(4)]
    if len(position) == 1:
        return [position[0] * 10000 ** (-c / 4) for c in range(4)]
    return [p * 100 ** (-c / 2) for p in position for c in range(2)]    # half of the pairs for each


@pytest.mark.parametrize("pe, make, positions", [("rope", make_gpt, SOME), ("rope", make_vit, GRID),
                                                 ("rope_mixed", make_vit, GRID)])
def test_rope_turns_queries_and_keys(pe, make, positions):
    model = make(pe)

    def logit(layer, head, q, k, i, j):
        q = turned(q, slow_angles(model, layer, head, positions[i].tolist()))
        return q @ turned(k, slow_angles(model, layer, head, positions[j].tolist())) / math.sqrt(8)

    check_attention(model, positions, logit, atol=2e-4)     # angles are kept in float32


@pytest.mark.parametrize("encoding", ["seqpe-input", "sinusoidal", "learned"])
@pytest.mark.parametrize("make, positions", [(make_gpt, SOME % 8), (make_vit, GRID % 4)], ids=["GPT", "ViT"])
def test_input_encodings_are_added_once(encoding, make, positions):
    model, share = make(encoding), 16 // positions.size(1)
    first, second = model.pe(positions)
    assert second == Signal() and first == Signal(input=first.input)
    cls = [] if model.pe.cls is None else [model.pe.cls[None]]
    if encoding == "seqpe-input":
        assert gpt(encoding).pe.input_gain.item() == pytest.approx(0.1)     # 1 drowns a text's tokens
        gain = model.pe.input_gain.item()
        slow, cls = gain * slow_encoder(model.encoder, positions), [gain * row for row in cls]
    elif encoding == "learned":
        slow = torch.stack([model.pe.embedding.weight[tuple(position)] for position in positions.tolist()])
    else:       # each coordinate has its share of the channels: sines, then cosines
        slow = torch.tensor([[wave(p * 10000 ** (-c / (share // 2))) for p in position
                              for wave in (math.sin, math.cos) for c in range(share // 2)]
                             for position in positions.tolist()]) * model.pe.embedding.gain.item()
    assert_close(first.input, torch.cat([*cls, slow]), rtol=0, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("make, encoding, positions, shift", [
    *((make_gpt, encoding, SOME, [700]) for encoding in ("rope", "alibi", "relative")),
    *((make_vit, encoding, GRID, [5, 30]) for encoding in ("rope", "rope_mixed"))])
def test_relative_encodings_do_not_see_a_shift(make, encoding, positions, shift):
    model, n = make(encoding), len(positions)
    x, cut = randn(2, n, 16), int(model.pe.class_token)
    for layer, block in enumerate(model.blocks):
        here, moved, spread = (block.attn(x, model.pe(each)[layer].at(slice(cut, cut + n)))
                               for each in (positions, positions + torch.tensor(shift), positions * 2))
        assert_close(here, moved, rtol=0, atol=2e-3)        # angles are of float32 frequencies
        assert (here - spread).abs().max() > 0.01


def test_no_matrix_of_all_pairs_is_built():
    T, shapes = 512, []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            shapes.extend(leaf.shape for leaf in tree_leaves(result) if torch.is_tensor(leaf))
            return result

    for encoding in TEXT:
        model, idx = make_gpt(encoding, n_layer=1, block_size=T).float(), tokens(2, T)
        shapes.clear()
        with Recorder():
            model(idx, targets=idx)[1].backward()
        pairs = [shape for shape in shapes if shape.count(T) > 1 or shape.numel() >= T * T]
        assert shapes and bool(pairs) == (encoding == "relative")       # a matrix itself


@pytest.mark.parametrize("make, encoding, old, new", [
    *((make_gpt, encoding, (8,), new) for encoding in TEXT for new in ((16,), (5,), (8,))),
    *((make_vit, encoding, (4, 4), new) for encoding in IMAGE for new in ((8, 12), (6, 3), (4, 4)))])
def test_a_window_is_stretched_over_another(make, encoding, old, new):
    """Relative encodings get positions in between, past the ends as well; embeddings are interpolated."""
    model = make(encoding)
    signals, first = model.pe.interpolate(new), int(model.pe.class_token)
    places = list(itertools.product(*([(i + 0.5) * o / n - 0.5 for i in range(n)] for o, n in zip(old, new))))
    for layer, signal in enumerate(signals):
        if "rope" in encoding:
            slow = torch.tensor([[slow_angles(model, layer, head, place) for place in places]
                                 for head in range(signal.rotate.size(-3))])
            slow = torch.stack([slow.cos(), slow.sin()])
            assert_close(signal.rotate[..., first:, :], slow, rtol=0, atol=1e-5)
        elif encoding == "alibi":
            j = signal.extend[1].sum(-1)
            assert_close(j, torch.tensor(places).T.expand_as(j), rtol=0, atol=1e-4)
    slow = model.pe(window(old)) if new == old else []
    if encoding.startswith(("seqpe", "learned", "sinusoidal")):
        e = model.pe.embedding(window(old)).T.reshape(1, -1, *old)
        e = F.interpolate(e, size=new, mode="linear" if len(old) == 1 else "bicubic", align_corners=False)
        slow = slow + model.pe.signals(e.flatten(2)[0].T)
    for a, b in zip(tree_leaves(signals * 2), tree_leaves(slow)):
        assert a is b is None or torch.allclose(a, b, rtol=0, atol=1e-6)
    if make is make_gpt and new != old:
        x = model.transform(model.tokens(tokens(2, *new)), signals)
        assert_close(model(tokens(2, *new), interpolate=True)[0], x @ model.tokens.weight.T)


@pytest.mark.parametrize("encoding", TEXT)
def test_in_bfloat16_weights_are_rounded_and_angles_are_not(encoding):
    """Angles of position 5000 would be off by many turns."""
    model, far = make_gpt(encoding).bfloat16(), torch.tensor([[4999], [5000]])
    logits, loss = model(tokens(2, 8), tokens(2, 8, seed=1))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and loss.isfinite()
    if encoding == "rope":
        slow = torch.tensor([slow_angles(model, 0, 0, position) for position in far.tolist()])
        slow = torch.stack([slow.cos(), slow.sin()]).unsqueeze(1)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert_close(model.pe(far)[1].rotate, slow, rtol=0, atol=2e-3)
    if encoding == "sinusoidal":
        angle = far * torch.tensor([10000 ** (-c / 8) for c in range(8)])
        e = model.pe.embedding(far) / model.pe.embedding.gain.float()
        assert_close(e, torch.cat([angle.sin(), angle.cos()], dim=-1), rtol=0, atol=2e-3)
    if encoding == "alibi":
        j = model.pe(window((60000,)))[0].extend[1]
        assert j.bfloat16().double().sum(-1).equal(torch.arange(60000.0).double().expand(2, -1))


# ------------------------------------------------------------------------------------------------------------
# GPT and ViT


@pytest.mark.parametrize("make, x, targets", [(make_gpt, tokens(2, 7), tokens(2, 7, seed=1)),
                                              (make_vit, randn(2, 2, 6, 4), torch.tensor([[4], [0]]))])
def test_models_are_plain_transformers(make, x, targets):
    model, losses = make("nope"), []
    weights, targets[0, 1:6] = model.state_dict(), -1       # some that do not count
    logits, loss = model(x, targets.squeeze(1))
    for row, each, wanted in zip(logits, x, targets):
        if make is make_gpt:
            h = weights["tokens.weight"][each]
        else:
            h = torch.stack([each[:, y:y + 2, x:x + 2].flatten() for y in (0, 2, 4) for x in (0, 2)])
            h = h @ weights["patches.weight"].flatten(1).T + weights["patches.bias"]
            h = torch.cat([weights["cls"][None], h])
        for layer in range(2):
            h = slow_block(h, weights, f"blocks.{layer}", causal=make is make_gpt)
        h = slow_layer_norm(h, weights, "ln")       # GPT's weights are tied
        h = h @ weights["tokens.weight"].T if make is make_gpt else slow_linear(h[:1], weights, "head")
        assert_close(row.view_as(h), h)
        losses += [-math.log(p[target]) for p, target in zip(h.softmax(-1), wanted) if target >= 0]
    assert loss.item() == pytest.approx(sum(losses) / len(losses)) and model(x)[1] is None


@pytest.mark.parametrize("encoding", TEXT)
def test_gpt_cannot_see_the_future_nor_other_sequences(encoding):
    model, idx = make_gpt(encoding), tokens(2, 8)
    logits, _ = model(idx)
    for t in range(1, 8):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        other, _ = model(changed)
        assert_close(other[0, :t], logits[0, :t])
        assert_close(other[1], logits[1])
        assert (other[0, t:] - logits[0, t:]).abs().amax(1).min() > 1e-3
    check_gradients(model(idx, tokens(2, 8, seed=1))[1], model)


@pytest.mark.parametrize("make, encoding, x, shape", [
    *((make_gpt, encoding, tokens(3, 8), (8,)) for encoding in TEXT),
    *((make_vit, encoding, randn(3, 2, 8, 8), (4, 4)) for encoding in IMAGE)])
def test_positions_of_a_batch_are_those_of_each_sequence(make, encoding, x, shape):
    model = make(encoding)
    assert_close(model(x, positions=window(shape))[0], model(x)[0])
    positions = torch.stack([window(shape).roll(i, 0) for i in (3, 0, 3)])      # some the same
    together = model(x, positions=positions)[0]
    for b in range(3):
        assert_close(together[b:b + 1], model(x[b:b + 1], positions=positions[b])[0])
    assert torch.allclose(together[::2], model(x)[0][::2]) == (encoding == "nope")


def test_a_bias_is_added_to_that_of_the_encoding():
    model, plain = (make_gpt(encoding, n_layer=1, n_head=1) for encoding in ("relative", "nope"))
    idx, bias, own = tokens(2, 8), randn(2, 1, 8, 8), model.pe(window((8,)))[0].bias
    plain.load_state_dict(model.state_dict())
    assert_close(model(idx)[0], plain(idx, bias=own.expand(2, 1, -1, -1))[0])
    assert_close(model(idx, bias=bias)[0], plain(idx, bias=own + bias)[0])
    for b in range(2):      # each sequence has its own
        assert_close(model(idx[b:b + 1], bias=bias[b:b + 1])[0][0], model(idx, bias=bias)[0][b])


def slow_generate(model, idx, n, temperature=1.0, top_k=None, generator=None):
    """No cache: a full forward pass for each token."""
    for _ in range(n):
        logits = model(idx)[0][:, -1].float()
        if top_k is not None:
            logits = torch.where(logits < logits.sort().values[:, -top_k:][:, :1], -math.inf, logits)
        p = F.one_hot(logits.argmax(-1), 11) if temperature == 0 else (logits / temperature).softmax(-1)
        idx = torch.cat([idx, torch.multinomial(p.float(), 1, generator=generator)], dim=1)
    return idx


@pytest.mark.parametrize("encoding", TEXT)
def test_cached_generation_is_a_full_pass_at_each_step(encoding):
    model = make_gpt(encoding)
    for sampling in (dict(temperature=0), dict(), dict(temperature=2.0, top_k=4), dict(top_k=1000)):
        for length, n in ((1, 7), (4, 5 if encoding == "learned" else 12), (5, 0)):     # past the window of 8
            idx = tokens(3, length)
            fast = model.generate(idx, n, generator=seeded(), **sampling)
            assert fast.equal(slow_generate(model, idx, n, generator=seeded(), **sampling))
            assert fast.shape == (3, length + n) and fast[:, :length].equal(idx)


@pytest.mark.parametrize("encoding", IMAGE)
def test_images_of_any_size(encoding):
    """Their patches are at row and column, in an oblong image, too, and those not kept have no say."""
    model = make_vit(encoding)
    for grid in ((2, 4), (3, 1), (4, 4), (3, 7)):
        x = randn(2, 2, 2 * grid[0], 2 * grid[1])
        h = torch.cat([model.cls.expand(2, 1, -1), model.patches(x).flatten(2).transpose(1, 2)], dim=1)
        stretched = model.head(model.transform(h, model.pe.interpolate(grid))[:, 0])
        assert_close(model(x, interpolate=True)[0], stretched, rtol=0, atol=1e-5)
        if encoding != "learned" or max(grid) <= 4:
            logits = model.head(model.transform(h, model.pe(window(grid)))[:, 0])
            assert_close(model(x)[0], logits)
            assert torch.allclose(logits, stretched, atol=1e-5) == (encoding == "nope" or grid == (4, 4))
    x, upper = randn(4, 2, 8, 8), torch.randperm(8, generator=seeded())     # two rows of four patches
    grids = torch.stack([window((4, 4)).roll(i, 0) for i in (0, 1, 0, 2)])
    assert_close(model(x, kept=upper)[0], model(x[:, :, :4])[0])
    assert_close(model(x, positions=grids, kept=upper)[0], model(x[:, :, :4], positions=grids[:, :8])[0])
    check_gradients(model(x, torch.tensor([0, 1, 2, 3]))[1], model)


@pytest.mark.parametrize("encoding", IMAGE)
def test_the_class_token_has_a_position_of_its_own(encoding):
    pe = make_vit(encoding).pe
    signals = pe(window((4, 4))), pe(window((2, 2)) + torch.tensor([1, 2])), pe.interpolate((6, 6))
    for here, there, stretched in zip(*(filter(torch.is_tensor, tree_leaves(each)) for each in signals)):
        assert (here.size(-2), there.size(-2), stretched.size(-2)) == (17, 5, 37)
        assert_close(here[..., 0, :], there[..., 0, :])
        assert_close(here[..., 0, :], stretched[..., 0, :])
        assert_close(here[..., 1 + 6, :], there[..., 1, :])     # behind it (1, 2) is patch 6


# ------------------------------------------------------------------------------------------------------------
# The GPU path without a GPU, errors, and sections of the file


@pytest.fixture
def reads(monkeypatch):
    """Tensors without content, which say so when host and device meet; `meta` is the device.

    Where Python reads a value is written down, and the value made up. So is what unique() finds.
    """
    devices = []
    for name, value in (("__bool__", False), ("__int__", 0)):
        read = lambda tensor, value=value: devices.append(tensor.device.type) or value     # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, read)
    monkeypatch.setattr(torch.Tensor, "unique", lambda t, dim, return_inverse: (t, torch.arange(len(t))))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(FakeTensorDeviceMismatchError):
            torch.ones(3) + torch.ones(3, device="meta")
        yield devices


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("make, encoding", [(gpt, each) for each in TEXT] + [(vit, each) for each in IMAGE])
def test_models_on_a_device(reads, make, encoding, where):
    """With positions on the host, as the code makes them, the host never waits for a value of the device."""
    with torch.device("meta"):
        model, shape = make(encoding, n_layer=1), (8,) if make is gpt else (4, 4)
    x = torch.zeros(2, 8, dtype=torch.int64) if make is gpt else torch.ones(2, 2, 8, 8)
    targets = x if make is gpt else torch.zeros(2, dtype=torch.int64)
    x, targets, windows = x.to("meta"), targets.to("meta"), place_windows(shape, 2, 100, device=where)
    more = dict(bias=count_bias(windows)) if make is gpt else dict(kept=torch.arange(5))
    for settings in ({}, dict(positions=windows[0]), dict(positions=windows, **more)):
        model(x, targets, **settings)[1].backward()
    assert model(torch.cat([x, x], dim=-1), interpolate=True)[0].device.type == "meta"
    for sampling in (dict(temperature=0), dict(top_k=3)) if make is gpt else ():
        assert model.generate(x[:, :3], 4, **sampling).device.type == "meta"
    assert where == "meta" or set(reads) <= {"cpu"}


@pytest.mark.parametrize("shape, norm", [((8,), None), ((4, 4), 3.0)])
def test_seqpe_on_a_device(reads, shape, norm):
    with torch.device("meta"):
        encoder = SeqPE(16, n_dim=len(shape), norm=norm)
    for where in ("cpu", "meta"):
        encoder(place_windows(shape, 3, 20_000, device=where), check=False).sum().backward()
    for paper in (False, True):
        position_regularizers(encoder, shape, paper=paper).backward()
    assert not reads
    warm_up(encoder, shape, 2)
    assert encoder(window(shape)).device.type == "meta"


def test_the_encoder_is_exported_for_any_number_of_positions():
    encoder, T = SeqPE(16, n_dim=2, max_position=50), torch.export.Dim("T", max=1000)
    exported = torch.export.export(encoder, (window((3, 4)),), {"check": False},
                                   dynamic_shapes={"positions": {0: T}, "check": None}).module()
    assert_close(exported(window((7, 5)), check=False), encoder(window((7, 5))))


ERRORS = {
    "float positions": (lambda: SeqPE(8)(torch.ones(3, 1)), TypeError, "integers.*torch.float32"),
    "bool positions": (lambda: SeqPE(8)(torch.tensor([True])), TypeError, "integers.*torch.bool"),
    "a list of positions": (lambda: SeqPE(8)([1, 2]), TypeError, "integers.*list"),
    "last dimension": (lambda: SeqPE(8, n_dim=2)(torch.zeros(4, 3).long()), ValueError, r"n_dim=2.*\(4, 3\)"),
    "n_embd and n_head": (lambda: SeqPE(10, 4), ValueError, "n_embd=10.*n_head=4"),
    "width and n_head": (lambda: SeqPE(8, 4, width=6), ValueError, "width=6.*n_head=4"),
    "one channel a head": (lambda: SeqPE(4, norm=3.0), ValueError, "norm.*more than one channel"),
    "too many positions": (lambda: SeqPE(8, max_position=2 ** 30 + 1), ValueError, r"2 \*\* 30"),
    "far too many": (lambda: SeqPE(8, base=2, max_position=2 ** 63 + 1), ValueError, r"2 \*\* 30"),
    **{f"{name}={value}": (lambda name=name, value=value: SeqPE(8, **{name: value}), ValueError, "SeqPE")
       for name, value in (("base", 1), ("n_layer", 0), ("n_dim", 0), ("n_head", 0), ("max_position", 0),
                           ("width", -8))},
    "a window of an integer": (lambda: window(5), TypeError, r"tuple such as \(128,\).*5"),
    "a window too large": (lambda: place_windows((4, 11), 2, 10), ValueError, r"\(4, 11\).*0 to 9"),
    "regularisers: an integer": (lambda: position_regularizers(SeqPE(8), 64), TypeError, "tuple.*64"),
    "too large": (lambda: position_regularizers(SeqPE(8, max_position=10), (11,)), ValueError, "11.*0 to 9"),
    "not 2-D": (lambda: position_regularizers(SeqPE(8, n_dim=2), (8,), 0), ValueError, r"\(8,\).*n_dim=2"),
    "gpt: rope_mixed": (lambda: gpt("rope_mixed"), ValueError, "rope_mixed.*2 dimensions"),
    "gpt: heads for rope": (lambda: gpt("rope", n_embd=6), ValueError, "divisible by 2.*3"),
    "gpt: width for sinusoidal": (lambda: gpt("sinusoidal", n_embd=9, n_head=3), ValueError, "by 2.*9"),
    "gpt: past the table": (lambda: gpt("learned")(tokens(1, 9)), ValueError, r"\(8,\).*\(8,\).*interpolate"),
    "gpt: before it": (lambda: gpt("learned")(tokens(1, 1), positions=SOME[:1] - 1), ValueError, r"\(-1,\)"),
    "gpt: generating past it": (lambda: gpt("learned").generate(tokens(1, 3), 7), ValueError, r"\(8,\)"),
    "gpt: past the limit": (lambda: gpt()(tokens(1, 1001)), ValueError, "1000 .*0 to 999.*max_position=1001"),
    "gpt: an empty prompt": (lambda: gpt().generate(tokens(1, 0), 3), ValueError, "a token to start from"),
    "gpt: no tokens to choose": (lambda: gpt().generate(tokens(1, 1), 3, top_k=0), ValueError, "top_k >= 1"),
    "vit: image and patch": (lambda: vit(image_size=9), ValueError, "image_size=9.*patch_size=2"),
    "vit: image": (lambda: vit()(torch.zeros(1, 2, 8, 9)), ValueError, r"\(8, 9\).*patch_size=2"),
    "vit: alibi": (lambda: vit("alibi"), ValueError, "alibi.*text"),
}


@pytest.mark.parametrize("call, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_first_four_sections_work_alone():
    """In a model of another's, with nothing but torch: also gradients through bias and embeddings."""
    text = Path(seqpe.__file__).read_text(encoding="utf-8")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    assert "torch" in imported and imported <= {"torch", *sys.stdlib_module_names}

    alone = {"__name__": "alone"}
    exec(text.split("# 5. Position encodings")[0], alone)
    assert "GPT" not in alone and "TransformerConfig" not in alone
    torch.manual_seed(0)
    encoder = alone["SeqPE"](16, max_position=500)
    alone["warm_up"](encoder, (20,), 2, generator=seeded())
    windows = alone["place_windows"]((20,), 3, 500, generator=seeded())
    e, bias = encoder(windows), alone["count_bias"](windows, seeded()).squeeze(1)
    loss = (e @ e.transpose(-2, -1) + bias).softmax(-1).square().sum()
    check_gradients(loss + alone["position_regularizers"](encoder, (20,), generator=seeded()), encoder)

# ------------------------------------------------------------------------------------------------------------
# The scripts

TINY = {"n-layer": 1, "n-head": 2, "n-embd": 16, "pe-embd": 8, "batch-size": 4, "steps": 30, "pe-warmup": 10}
SIZE = {train_lm: {"block-size": 8}, train_vit: {"image-size": 8, "patch-size": 2}}
OF_SCRIPT = {train_lm: ["seqpe", "rope", "alibi", "sinusoidal", "learned", "nope"],
             train_vit: ["seqpe", "rope", "rope_mixed", "sinusoidal", "learned", "nope"]}


@pytest.fixture(params=[train_lm, train_vit], ids=["lm", "vit"])
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    text = "".join(random.Random(0).choices("abcdefé\n", k=3000))
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    return tmp_path / "own.txt"


@pytest.fixture
def data(script, corpus, tmp_path):
    return corpus if script is train_lm else write_npz(tmp_path / "own.npz")


def write_npz(path, **arrays):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5), dtype=np.uint8)
    arrays = {"images": images, "labels": np.arange(40) % 3, **arrays}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def command(script, data, out, *arguments):
    """The arguments of a run of a third of a second; the last one of a kind counts."""
    tiny = [word for name, value in {**TINY, **SIZE[script]}.items() for word in (f"--{name}", value)]
    return [*map(str, (*tiny, "--data", data, "--out", out, *arguments))]


def run(script, *arguments):
    return script.main(command(script, *arguments))


def parsed(script, *arguments):
    """The arguments, and the kind of task, as run_all gets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "run_all", lambda make_task, args: (args, make_task))
        return script.main([*map(str, arguments)])


def task_of(script, data, *arguments):
    args, make_task = parsed(script, *command(script, data, "out", *arguments))
    task = make_task(args)
    task.read()
    return task


def outcome(capsys, script, arguments):
    """None where a call ends well, else what it says: one line, after which the exit code is 2."""
    capsys.readouterr()
    code = 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            train_lm.run_script(lambda: script.main([*map(str, arguments)]))
        except SystemExit as exit_:
            code = exit_.code
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    lines = [line for line in lines if line and not re.search(r"\d+/\d+ \[", line)]     # progress bars
    assert code in (0, 2) and len(lines) == (code == 2) and not warned, (arguments, code, lines, warned)
    assert all(line.startswith("script.py: ") for line in lines), lines
    return lines[0] if lines else None


def failure(capsys, script, *arguments):
    said = outcome(capsys, script, command(script, *arguments))
    assert said is not None, arguments
    return said


def on_step(monkeypatch, n, action):
    """Do something to model and loss in the n-th step; returns a list as long as there were steps."""
    original, calls = train_lm.training_loss, []

    def training_loss(task, model, *args):
        calls.append(1)
        loss = original(task, model, *args)
        return (action(model, loss) if len(calls) == n else None) or loss

    monkeypatch.setattr(train_lm, "training_loss", training_loss)
    return calls


def kill_with(number):
    return lambda model, loss: os.kill(os.getpid(), number)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def subprocess_of(script, arguments, **environment):
    """With one thread: those of two processes at once wait for each other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-u", script.__file__, *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment)


# ---- What is trained, and how it is recorded


def test_all_encodings_are_trained_and_recorded(script, data, tmp_path, capsys):
    """Table, JSON and SVG say the same; two seeds are two runs; the same seed gives the same numbers."""
    results = run(script, data, tmp_path / "out", "--pe", "all", "--seed", "0,1", "--steps", 8)
    stem = f"own-{','.join(OF_SCRIPT[script])}-seed0,1"
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert record["results"] == json.loads(json.dumps(results)) and record["arguments"]["steps"] == 8
    columns, form = ([8, 16, 32, 64, 128], ".3f") if script is train_lm else ([8, 12, 16, 20, 24], ".1f")
    for i, (title, rows) in enumerate(results.items()):
        assert title in printed and list(rows) == OF_SCRIPT[script]
        svg = ElementTree.parse(tmp_path / "out" / f"{stem}{'-1' if i else ''}.svg").getroot()
        lines = {g[-1].text: g for g in svg.iter() if g.tag.endswith("}g")}
        means = {pe: [statistics.mean(s[c] for s in row) for c in columns] for pe, row in rows.items()}
        spreads = {pe: [statistics.stdev(s[c] for s in row) for c in columns] for pe, row in rows.items()}
        ends = [m + sign * d for pe in rows for m, d in zip(means[pe], spreads[pe]) for sign in (-1, 1)]
        ends = ends if script is train_lm else [0, 100]
        for pe, spread in spreads.items():
            cells = [re.escape(f"{m:{form}}±{s:{form}}") for m, s in zip(means[pe], spread, strict=True)]
            assert re.search(rf"^{pe} *\| *" + r" *\| *".join(cells) + "$", printed, re.M)
            points = re.findall(r"([\d.]+),([\d.]+)", lines[pe][0].get("points"))
            for j, ((x, y), m) in enumerate(zip(points, means[pe], strict=True)):
                assert float(x) == pytest.approx(36 + 180 * j / 4, abs=0.5)
                height = 160 * (m - min(ends)) / (max(ends) - min(ends))
                assert float(y) == pytest.approx(200 - height, abs=0.06)
    for seed in (0, 1):
        single = run(script, data, tmp_path / f"{seed}", "--pe", "rope,seqpe", "--seed", seed, "--steps", 8)
        for title, rows in single.items():
            assert {pe: row for pe, [row] in rows.items()} == {pe: results[title][pe][seed] for pe in rows}


def test_training_learns(tmp_path):
    (tmp_path / "own.txt").write_text("abcdefgh" * 500)
    results = run(train_lm, tmp_path / "own.txt", tmp_path, "--pe", "seqpe,rope", "--steps", 60, "--lr", 1e-2)
    assert all(row[8] < 1.0 < math.log(8) for rows in results.values() for [row] in rows.values())


def test_evaluation_scores_the_same_characters_at_every_length(corpus):
    """Against one window at a time, and a loop over its characters."""
    task, text = task_of(train_lm, corpus, "--reach", 4), corpus.read_text(encoding="utf-8")[2700:]
    model, ends = task.model("rope"), []
    for T, score in next(iter(task.evaluate(model).values())).items():
        losses = []
        for window in task.windows("test", T):
            string = "".join(task.about[i] for i in window)
            assert string in text and len(string) == T + 1
            log_p = model(window[:-1].unsqueeze(0))[0][0].log_softmax(-1)
            losses += [-log_p[i, window[i + 1]].item() for i in range(T - 8, T)]
        assert score == pytest.approx(statistics.mean(losses), rel=1e-4)
        ends.append(task.windows("test", T)[:, -9:].tolist())
    assert len(ends) == 3 and ends[0] == ends[1] == ends[2]


def test_python_data_is_split_by_whole_files():
    texts, length = train_lm.read_text("python"), 0
    assert list(texts) == ["train", "val", "test"] and min(map(len, texts.values())) > 100_000
    for file in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        text, rest = file.read_text(encoding="utf-8"), zlib.crc32(file.name.encode()) % 10
        assert text in texts[{0: "val", 1: "test"}.get(rest, "train")]
        length += len(text)
    assert length == sum(map(len, texts.values()))      # so no file is in two of them


def test_arguments_come_before_recipes_and_those_before_defaults(script):
    for i, recipe in enumerate(("ours", "paper")):
        args = vars(parsed(script, "--recipe", recipe)[0])
        said = {flag[2:].replace("-", "_"): row[i] for flag, row in train_lm.RECIPES.items()}
        said |= train_vit.RECIPES[recipe] if script is train_vit else {"fusion": "scalar"}
        assert said == {name: args[name] for name in said} and (i or args == vars(parsed(script)[0]))
    for name, value in {"pieces": 7, "pe_norm": 2.5, "pe_dropout": 0.0, "fusion": "input"}.items():
        found = vars(parsed(script, "--recipe", "paper", f"--{name.replace('_', '-')}", value)[0])
        assert found == args | {name: value}
    for data, said in script.DEFAULTS.items():
        args = vars(parsed(script, "--data", data, "--steps", 7, "--lr", 0)[0])
        assert {name: args[name] for name in said} == said | {"steps": 7, "lr": 0.0}


@pytest.mark.parametrize("arguments", [["--recipe", "paper"], ["--pe-dropout", 0.5], ["--pieces", 4],
                                       ["--shifted-ood", 0, "--paper-groups", 1]], ids=str)
def test_any_recipe_is_trained_and_scored_without_dropout(script, data, tmp_path, monkeypatch, arguments):
    """--resume shows a finished run again, the very same numbers, and does not train."""
    arguments = (script, data, tmp_path / "out", "--shift-prob", 1, *arguments)
    results = run(*arguments)
    calls = on_step(monkeypatch, 0, None)
    assert run(*arguments, "--resume") == results and not calls


# ---- Interrupted, resumed, loaded


def test_resume_gives_the_weights_of_an_uninterrupted_run(corpus, tmp_path, monkeypatch):
    """Bit for bit, with dropout; a crash loses what came after the last of every hundred steps."""
    def crash(model, loss):
        raise MemoryError("out of memory")

    arguments = ["--steps", 103, "--pe-dropout", 0.1, "--reach", 1]
    run(train_lm, corpus, tmp_path, *arguments)
    whole = torch.load(tmp_path / "own-seqpe-seed0.pt")["model"]
    for step, action, code in ((1, kill_with(signal.SIGINT), 130), (55, kill_with(signal.SIGTERM), 130),
                               (101, crash, 2)):
        out = tmp_path / f"{step}"
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
            on_step(patch, step, action)
            train_lm.run_script(lambda: run(train_lm, corpus, out, *arguments))
        assert exit_.value.code == code and torch.load(out / "own-seqpe-seed0.pt")["step"] == min(step, 100)
        run(train_lm, corpus, out, *arguments, "--resume")
        resumed = torch.load(out / "own-seqpe-seed0.pt")["model"]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step


def test_an_interrupted_run_shows_and_keeps_what_is_finished(script, data, tmp_path, monkeypatch, capsys):
    arguments = (script, data, tmp_path / "out", "--pe", "rope,nope")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_step(patch, 33, kill_with(signal.SIGINT))
        run(*arguments)
    printed = capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert re.search(r"^rope +\|", printed, re.M) and "holds step 3 of 30; --resume goes on" in printed
    (record,) = (tmp_path / "out").glob("own-*.json")
    for rows in json.loads(record.read_text())["results"].values():
        assert list(rows) == ["rope"]
    calls = on_step(monkeypatch, 0, None)
    results, printed = run(*arguments, "--resume"), capsys.readouterr().out
    assert len(calls) == 27 and "rope-seed0.pt: finished" in printed and "going on from step 3" in printed
    assert all(list(rows) == ["rope", "nope"] for rows in results.values())


def test_an_earlier_run_is_not_overwritten(script, data, tmp_path, monkeypatch, capsys):
    """Not without --resume, and not by one with other arguments or data."""
    arguments = (script, data, tmp_path / "out", "--pe")
    run(*arguments, "rope")
    before, calls = contents(tmp_path / "out"), on_step(monkeypatch, 0, None)
    assert "own-rope-seed0.pt exists: --resume goes on" in failure(capsys, *arguments, "nope,rope")
    said = failure(capsys, *arguments, "nope,rope", "--resume", "--lr", 0.5)
    assert re.search(r"own-rope-seed0.pt: --lr is 0.00\d there, 0.5 here", said)
    if script is train_vit:
        write_npz(data, labels=np.arange(40) % 4)
    else:       # as many characters, but not the same
        data.write_text(data.read_text(encoding="utf-8").replace("a", "x"), encoding="utf-8")
    assert "was trained on other data" in failure(capsys, *arguments, "nope,rope", "--resume")
    assert contents(tmp_path / "out") == before and not calls


def test_two_at_once_on_an_ascii_console(corpus, tmp_path):
    """The same command twice in one folder; what is printed need not be in the console's characters."""
    arguments = command(train_lm, corpus, tmp_path / "out", "--steps", 101, "--resume")
    for process in [subprocess_of(train_lm, arguments, PYTHONIOENCODING="ascii") for _ in range(2)]:
        printed, errors = process.communicate(timeout=100)
        assert process.returncode == 0 and "Traceback" not in errors and "\n?" in printed
    assert [*contents(tmp_path / "out")] == [f"own-seqpe-seed0.{end}" for end in ("json", "pt", "svg")]
    train_lm.main(["--load", str(tmp_path / "out" / "own-seqpe-seed0.pt"), "--eval"])


@pytest.mark.parametrize("how, code", [("kill -9", -9), ("Ctrl-C", 130), ("| head -1", 2)])
def test_stopped_at_any_moment_a_run_can_be_resumed(corpus, tmp_path, how, code):
    path, steps = tmp_path / "out" / "own-seqpe-seed0.pt", 10 if code == 2 else 100_000
    process = subprocess_of(train_lm, command(train_lm, corpus, tmp_path / "out", "--steps", steps))
    if code == 2:
        assert process.stdout.readline().startswith("warming up")
        process.stdout.close()
    else:
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL if code == -9 else signal.SIGINT)
    assert "Traceback" not in process.stderr.read() and process.wait(100) == code
    assert torch.load(path)["step"] >= min(100, steps)
    assert code == -9 or not [name for name in contents(tmp_path / "out") if name.endswith(".tmp")]
    assert code != 2 or run(train_lm, corpus, tmp_path / "out", "--steps", steps, "--resume")


def test_load_samples_and_evaluates_without_training(script, data, tmp_path, monkeypatch, capsys):
    run(script, data, tmp_path / "out", "--pe", "seqpe,learned", "--max-position", 200)
    tables = re.findall(r"^(.+)\n\nenc[^\n]+\n[^\n]+\n(seqpe[^\n]+)", capsys.readouterr().out, re.M)
    calls, path = on_step(monkeypatch, 0, None), tmp_path / "out" / "own-seqpe-seed0.pt"
    moved, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args: moved.append(args) or to(self, *args))
    script.main(["--load", str(path), "--eval", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert tables and all(title in printed and row in printed for title, row in tables)
    assert ("cpu",) in moved        # where a GPU is, it would have to be there
    data.unlink()
    if script is train_lm:
        script.main(["--load", str(path), "--sample", "abc"])       # a sample needs no data
        assert "\nabc" in capsys.readouterr().out
    assert "own" in outcome(capsys, script, ["--load", path, "--eval"]) and not calls
    if script is train_lm:
        assert "vocabulary: 'Z'" in outcome(capsys, script, ["--load", path, "--sample", "aZ"])
        path = path.with_name("own-learned-seed0.pt")
        said = outcome(capsys, script, ["--load", path, "--sample", "a" * 9])
        assert "holds positions from 0 to below (8,)" in said


def test_a_damaged_or_foreign_checkpoint_is_one_line_that_names_it(script, data, tmp_path, capsys):
    other = train_vit if script is train_lm else train_lm
    theirs = write_npz(tmp_path / "theirs.npz") if other is train_vit else tmp_path / "own.txt"
    run(other, theirs, tmp_path / "theirs", "--pe", "rope")
    run(script, data, tmp_path / "out", "--pe", "rope")
    path, (foreign,) = tmp_path / "out" / "own-rope-seed0.pt", (tmp_path / "theirs").glob("*.pt")
    whole, good, name = path.read_bytes(), torch.load(path), "blocks.0.mlp.0.weight"
    matrix, weights, settings = good["model"][name], good["model"], good["settings"]
    other_about = good["about"] + "x" if script is train_lm else {}
    table = [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(60), foreign.read_bytes(), b"cos\nsystem\n.",
             *(whole[:n] for n in (1, 500, len(whole) // 2, len(whole) - 1)), [good], torch.zeros(3), None]
    table += [{key: good[key] for key in good if key != gone} for gone in ("settings", "model", "about")]
    table += [good | {"model": weights | more} for more in ({name: matrix[1:]}, {name: matrix * math.nan},
                                                            {"more": matrix})]
    table += [good | {key: value} for key, value in (
        ("model", []), ("settings", 5), ("settings", dict(enumerate(settings.values()))), ("about", 5),
        ("about", other_about))]
    file = tmp_path / "damaged.pt"
    for content in table:
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        assert f"{file}: " in (outcome(capsys, script, ["--load", file]) or ""), content
        path.write_bytes(file.read_bytes())
        said = failure(capsys, script, data, tmp_path / "out", "--pe", "rope", "--resume")
        assert str(path) in said, content
    for setting, value in [(setting, value) for setting in settings for value in ([8], {})]:
        torch.save(good | {"settings": settings | {setting: value}}, file)
        said = outcome(capsys, script, ["--load", file, "--eval"])
        assert said is None or f"{file}: " in said, (setting, value)       # some are of no consequence
    for file, said in ((tmp_path, "not a checkpoint"), (tmp_path / "nowhere.pt", "no such checkpoint")):
        assert f"{file}: {said}" in outcome(capsys, script, ["--load", file])


# ---- What cannot be used


def test_text_that_cannot_be_used_is_one_line(tmp_path, capsys):
    path = tmp_path / "own.txt"
    for content in (b"", b"a", b"a" * 5000, b"ab" * 10, bytes(range(256)) * 20):
        path.write_bytes(content)
        line = failure(capsys, train_lm, path, tmp_path / "out")
        assert f"--data {path}: " in line and ("not a UTF-8" if len(content) == 5120 else "too few") in line
    assert "No such file" in failure(capsys, train_lm, tmp_path / "nowhere", tmp_path / "out")
    assert "Is a directory" in failure(capsys, train_lm, tmp_path, tmp_path / "out")
    path.write_bytes(b"\xef\xbb\xbf" + b"abc\r\n" * 1000)       # a byte order mark is no character
    assert task_of(train_lm, path).about == "\nabc"


def npz_of(**headers):
    """Bytes of an .npz whose arrays are hardly more than a header, written by hand."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, (descr, shape) in headers.items():
            header = dict(descr=descr, fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(array := io.BytesIO(), header)
            archive.writestr(f"{name}.npy", array.getvalue() + bytes(100))
    return file.getvalue()


def test_images_that_cannot_be_used_are_one_line(tmp_path, capsys):
    path, grey = tmp_path / "own.npz", np.zeros((40, 6, 5), np.uint8)
    whole = write_npz(path).read_bytes()
    encrypted = re.sub(b"(?s)(PK\x03\x04..|PK\x01\x02....).", b"\\1\x01", whole)
    np.save(array := io.BytesIO(), grey)
    foreign = [b"", b"not a zip archive", b"PK\x03\x04" + bytes(60), random.Random(0).randbytes(5000),
               encrypted, array.getvalue(), npz_of(), *(whole[:n] for n in (10, 700, 1000, len(whole) - 1)),
               npz_of(images=("|u1", (10 ** 6, 10 ** 3, 10 ** 3)), labels=("<i8", (10 ** 12,))),
               dict(labels=None), dict(images=None), dict(labels=np.array([None] * 40))]
    shapes = (40, 6), (40, 6, 5, 4), (40, 6, 0), (0, 6, 5)
    wrong = [dict(images=images) for images in (grey / 2, *(np.zeros(shape, np.uint8) for shape in shapes))]
    wrong += [dict(labels=np.arange(40) + n) for n in (-1, 10 ** 9, 0.5)]
    wrong += [dict(labels=labels) for labels in (np.arange(39), np.array(["a"] * 40), np.zeros(40, bool),
                                                 np.full(40, 2 ** 64 - 1, np.uint64), np.array(1))]
    wrong += [dict(images=grey[:0], labels=np.arange(0))]
    few = [dict(images=grey[:5], labels=np.arange(5))]
    for said, table in (("not an .npz file", foreign), ("must be uint8", wrong), ("too few", few)):
        for content in table:
            path.write_bytes(content) if isinstance(content, bytes) else write_npz(path, **content)
            line = failure(capsys, train_vit, path, tmp_path / "out")
            assert f"--data {path}: " in line and said in line, content
    assert "no such file" in failure(capsys, train_vit, tmp_path / "nowhere", tmp_path / "out")
    assert f"{tmp_path}: " in failure(capsys, train_vit, tmp_path, tmp_path / "out")


def test_a_full_disk_is_one_line_and_keeps_what_was_there(corpus, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_step(patch, 3, kill_with(signal.SIGINT))
        run(train_lm, corpus, tmp_path / "out")
    before = contents(tmp_path / "out")
    for place, name in ((os, "fsync"), (train_lm, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full, raising=False)
            assert "No space left" in failure(capsys, train_lm, corpus, tmp_path / "out", "--resume")
        assert contents(tmp_path / "out") == before and len(before) == 1


def test_what_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch, capsys):
    """Nothing of it is saved; what was finished before is shown."""
    on_step(monkeypatch, 50, lambda model, loss: loss * math.nan)
    said = failure(capsys, train_lm, corpus, tmp_path / "out", "--pe", "rope,nope")
    assert "nope at step 30: weights that are not finite" in said
    assert [*contents(tmp_path / "out")] == [
        "own-rope,nope-seed0.json", "own-rope,nope-seed0.svg", "own-rope-seed0.pt"]


def test_arguments_that_cannot_be_used_are_one_line(script, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = {"--pe rotary": "known: seqpe, rope", "--fusion sum": "choice: 'sum'", "--lr nan": "got 'nan'",
             "--steps 0": "from 1 to 10000000, got '0'", "--lr fast": "invalid float value: 'fast'",
             "--n-head 3": "n_embd=16 is not divisible by n_head=3", "--eval": "--load", "--batch 3": "--ba",
             "--max-position 2": "--max-position 2 is too small", "--seed -1": "must be from 0",
             "--pe rope --n-embd 6": "rope in ", "--device cuda": "finds no cuda here",
             "--pe-embd 9": "n_embd=9, width=9 must be", "--seed x": "invalid int value: 'x'"}
    more = {"--sample a": "go with --load", "--data recall --block-size 41": "at least 42"}
    table |= more if script is train_lm else {"--image-size 9": "not divisible by patch_size=2"}
    for arguments, said in table.items():
        assert said in failure(capsys, script, data, tmp_path / "out", *arguments.split())
    assert "own" in failure(capsys, script, data, data)     # --out is a file
    assert not list(tmp_path.glob("out/*"))


def test_random_command_lines_are_accepted_or_one_line(script, data, tmp_path, monkeypatch, capsys):
    """Whatever is accepted is finite and in range; a few small ones are run to their end."""
    rng, accepted, n_refused, n_well = random.Random(0), [], 0, 0
    numbers = [*train_lm.RECIPES, *train_lm.OPTIONS, "--seed"]
    numbers += [f"--{name}" for name in SIZE[script]]
    words = {"--pe": [*OF_SCRIPT[script], "all", "seqpe,rope", ","], "--recipe": ["ours", "paper"],
             "--data": [data, "nowhere"], "--fusion": ["scalar", "mul", "add", "input"],
             "--split": ["val", "train"], "--device": ["cpu", "cuda", "auto", "tpu"], "--sample": ["a", "Z"]}
    good, bad = [0, 1, 2, 8, 16, 0.0, 0.5, "1e-3"], [
        -1, "-0.5", 10 ** 12, "1" + "0" * 400, "1" + "0" * 5000, "nan", "inf", "-inf", "", " ", "x", "1.5",
        "0x10", "--", "\0", "٣", "1,2", "é" * 50]
    with monkeypatch.context() as patch:
        patch.setattr(script, "run_all", lambda make_task, args: accepted.append(args))
        for _ in range(400):
            line = []
            for flag in rng.choices([*numbers, *words], k=rng.randint(1, 4)):
                line += [flag, rng.choice(bad if rng.random() < 0.3 else words.get(flag, good))]
            n_refused += outcome(capsys, script, line[:-1] if rng.random() < 0.05 else line) is not None
    assert len(accepted) + n_refused == 400 and min(len(accepted), n_refused) > 50
    for args in accepted:
        assert all(0 <= value < 2 ** 33 for value in vars(args).values() if type(value) in (int, float)), args
        assert set(args.pe) <= set(OF_SCRIPT[script]) and args.pe
    for i in range(25):
        line = []
        for flag in rng.sample([*numbers, "--pe", "--fusion", "--recipe"], 3):
            line += [flag, rng.choice(words.get(flag, [0, 1, 2, 4, 8, 16, 0.5]))]
        line = command(script, data, tmp_path / f"{i}", *line, "--steps", 2)
        n_well += outcome(capsys, script, line) is None
    assert 2 < n_well < 23


# ---- Recall, shifted steps, speed, pictures

RECORD = re.compile("@([a-z]{2})=([0-9]{3})")


@pytest.fixture(scope="module")
def recall():
    """The task on windows of 64 characters, of which 42 are records and questions."""
    return task_of(train_lm, "recall", "--block-size", 64, "--batch-size", 16)


def strings(task, text):
    return ["".join(task.about[i] for i in row) for row in text]


@pytest.mark.parametrize("T", [42, 64, 300])
def test_records_are_asked_for_again_at_the_end(recall, T):
    haystack = torch.full((40, T + 1), recall.about.index("x"))
    places, same_order = Counter(), 0
    for text in strings(recall, recall.ask(haystack, seeded())):
        records, questions = RECORD.findall(text[:-21]), RECORD.findall(text[-21:])
        assert len(records) == len({key for key, _ in records}) == 3 and sorted(records) == sorted(questions)
        assert len(text) == T + 1 and RECORD.sub("", text) == "x" * (T + 1 - 42)
        places.update(match.start() for match in RECORD.finditer(text[:-21]))
        same_order += records == questions
    assert 0 < same_order < 20
    assert T == 42 or len(places) > min(20, T / 4) and max(places) > T - 40 - T / 10 and min(places) < T / 10


def test_records_may_repeat_and_are_decided_by_the_generator(recall):
    state, first = torch.get_rng_state(), recall.batch(seeded(1))
    assert torch.equal(first, recall.batch(seeded(1))) and not torch.equal(first, recall.batch(seeded(2)))
    assert torch.equal(torch.get_rng_state(), state) and first.shape == (16, 65)
    records = [RECORD.findall(text) for text in strings(recall, first)]
    assert {(len(r), len(set(r))) for r in records} == {(6, 1), (6, 2), (6, 3)}


def test_recalls_loss_is_that_of_answers_and_text(recall):
    model, batch = recall.model("seqpe").double(), recall.batch(seeded())[:3]
    log_p = model(batch[:, :-1])[0].log_softmax(-1)
    nats = -torch.stack([log_p[b, t, batch[b, t + 1]] for b in range(3) for t in range(64)]).view(3, 64)
    answers = [64 - 21 + 7 * question + 4 + digit for question in range(3) for digit in range(3)]
    torch.testing.assert_close(recall.loss(model, batch, None, None), nats[:, answers].mean() + nats.mean())


def test_an_answer_is_right_when_greedy_decoding_writes_it(recall, monkeypatch):
    torch.manual_seed(0)
    model, digits = recall.model("seqpe"), recall.encode("01").long()
    with torch.no_grad():       # an untrained model seldom writes a digit: this one writes 0 or 1
        common, noise = model.tokens.weight[digits].sum(0), torch.randn(16)
        model.ln.bias.copy_(1000 * common)
        noise -= common * (noise @ common) / (common @ common)
        model.tokens.weight[digits] = 3 * common + torch.stack([noise, -noise])
    text = recall.ask(recall.windows("val", 64), seeded())[:50]
    places = torch.arange(44, 65).view(3, 7)[:, 4:]
    text[:, places.flatten()] = digits[torch.randint(2, (50, 9), generator=seeded())]
    monkeypatch.setattr(recall, "ask", lambda windows, generator: text)
    right = [torch.equal(model.generate(row[None, :place[0]], 3, temperature=0)[0, -3:], row[place])
             for row in text for place in places]
    assert recall.score(model, "val", 64) == pytest.approx(sum(right) / 1.5) and 0 < sum(right) < 150


def test_recall_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lm.Recall, "n_evaluated", 4)
    results = run(train_lm, "recall", tmp_path, "--block-size", 48, "--steps", 2, "--pe", "seqpe,learned")
    rows = results["% of answers right with a context of"]
    assert list(rows["learned"][0]) == [48, 96, 192, 384, 768] and list(tmp_path.glob("*.svg"))
    train_lm.main(["--load", str(tmp_path / "recall-seqpe-seed0.pt"), "--eval"])
    printed = capsys.readouterr().out
    assert "answers right" in printed and f"{rows['seqpe'][0][768]:.1f}" in printed


@pytest.mark.parametrize("pieces, shifted_ood", [(1, 1), (3, 0)])
def test_shifted_steps_share_eight_windows(script, data, monkeypatch, pieces, shifted_ood):
    """What model and regularisers are given on a shifted step, and on one that is not."""
    given, weights, shape = [], [], (8,) if script is train_lm else (4, 4)
    task = task_of(script, data, "--batch-size", 20, "--pieces", pieces, "--shift-prob", 1,
                   "--shifted-ood", shifted_ood)
    model, batch = task.model("seqpe"), task.batch(seeded())
    monkeypatch.setattr(task, "loss", lambda *all_: given.append(all_[2:]) or torch.zeros(()))
    monkeypatch.setattr(train_lm, "position_regularizers", lambda *all_, **_: weights.append(all_[2:]) or 0.0)
    for _ in range(20):
        train_lm.training_loss(task, model, batch, task.args)
    for positions, bias in given:
        assert positions.shape == (20, math.prod(shape), len(shape))
        assert positions[:8].equal(positions[8:16]) and positions[:4].equal(positions[16:])
        if script is train_lm:      # a bias of all that is torn, and of nothing else
            assert (bias is not None) == (pieces > 1)
            torn = (positions.diff(dim=1) > 1).any(1).squeeze(-1)
            assert bias is None or bias.shape == (20, 1, 8, 8) and torn.equal((bias > 0).flatten(1).any(1))
    assert set(weights) == {(0.1, 0.1 * shifted_ood)}
    assert max(len(positions.unique(dim=0)) for positions, _ in given) == 8
    task.args.shift_prob = 0.0
    train_lm.training_loss(task, model, batch, task.args)
    assert given[-1] == (None, None) and weights[-1] == (0.1, 0.1)


def test_bench_prints_a_row_for_a_step_and_for_reading(tmp_path, capsys):
    (tmp_path / "own.txt").write_text("abcdefgh" * 1000)
    run(train_lm, tmp_path / "own.txt", tmp_path, "--bench", "--pe", "seqpe,rope")
    rows = capsys.readouterr().out.splitlines()
    steps, reading = ["step", "shifted step"], ["read 8", "read 32", "read 128", "read 512"]
    assert [row[:12].rstrip() for row in rows] == steps + reading
    assert all(re.search(r" seqpe +[\d.]+ ms \([\d.]+x\) +rope +[\d.]+ ms \(1.00x\)$", row) for row in rows)


def test_heat_map_is_a_picture_of_the_dot_products():
    torch.manual_seed(0)
    encoder = SeqPE(8, 2)       # 0 to 19,999, five digits: the longest carry is that to 10000
    title, *lines = train_lm.heat_map(encoder, size=8).splitlines()
    assert re.fullmatch(r"e_i \. e_j, 0 to 7 +e_i \. e_j, 9996 to 10003 *", title) and len(lines) == 4
    for start, column in ((0, 0), (9996, 10)):
        e = encoder(torch.arange(start, start + 8).unsqueeze(-1))
        dots = e @ e.T
        grey = ((dots - dots.min()) / (dots.max() - dots.min())).tolist()
        for i, line in enumerate(lines):
            pixels = zip(grey[2 * i], grey[2 * i + 1])
            assert line[column:column + 8] == "".join(" ░▒▓█"[round(2 * (u + v))] for u, v in pixels)
    assert train_lm.heat_map(SeqPE(8, 2, max_position=10)).startswith("e_i . e_j, 0 to 9\n")


# ---- Images


def test_the_digits_are_ucis_and_each_is_in_one_split():
    path = Path(train_vit.__file__).parent / "data" / "digits.csv.gz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in (path.parent / "README.md").read_text(encoding="utf-8")
    images, labels = train_vit.read_images("digits", 32)
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 240
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    every, *splits = [torch.cat([images.flatten(1), labels[:, None]], dim=1).tolist() for images, labels in (
        (images, labels), *task_of(train_vit, "digits").splits.values())]
    assert [len(split) for split in splits] == [1199, 200, 398] and sorted(sum(splits, [])) == sorted(every)
    assert all({row[-1] for row in split} == {*range(10)} for split in splits)


def test_images_are_drawn_at_any_size_without_skipping_pixels(tmp_path):
    images = train_vit.read_images("digits", 32)[0][:5]
    for size in (3, 8, 20):
        drawn = train_vit.draw(images, size)
        assert drawn.shape == (5, 1, size, size) and drawn.min() >= -1 and drawn.max() <= 1
    torch.testing.assert_close(train_vit.draw(images, 8), images / 255 * 2 - 1)
    stripes = np.tile(np.array([0, 255, 0, 0], np.uint8), (250, 36, 9))[..., None].repeat(3, -1)
    path = write_npz(tmp_path / "own.npz", images=stripes, labels=np.arange(250) % 3)
    found = train_vit.read_images(path, 9)[0]
    assert found.shape == (250, 3, 9, 9) and found.dtype == torch.uint8
    assert (found[..., 1:-1].float() - 255 / 4).abs().max() < 8     # every fourth pixel alone: 0 or 255


def test_augmented_images_are_parts_of_the_image(monkeypatch):
    images, state = train_vit.read_images("digits", 32)[0][:6], torch.get_rng_state()
    first, second, third = (train_vit.augment(images, 16, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (6, 1, 16, 16) and first.min() >= -1 and first.max() <= 1

    def augmented(*drawn):
        """drawn: zoom, angle, x and y, each of which is drawn uniformly from 0 to 1."""
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(drawn)[:, None].expand(4, 6))
        return train_vit.augment(images, 8, None)

    no_zoom, same = math.sqrt(math.log(1 / 0.75, 4)), images / 255 * 2 - 1
    torch.testing.assert_close(augmented(no_zoom, 0.5, 0.5, 0.5), same, rtol=0, atol=1e-5)
    assert not torch.allclose(augmented(no_zoom, 1.0, 0.5, 0.5), same, atol=0.1)
    middle = train_vit.draw(images, 24)[..., 8:16, 8:16]       # of the image at 3x; the filters differ a bit
    assert (augmented(1.0, 0.5, 0.5, 0.5) - middle).abs().mean() < 0.05 < (middle - same).abs().mean()
    assert (augmented(1.0, 0.5, 1.0, 0.5)[..., -1] < -0.9).all()       # a tenth beyond the border


def test_accuracy_counts_what_is_right_at_every_size():
    """A model that knows every second label. The learned table is interpolated in both tables."""
    task, shown = task_of(train_vit, "digits"), set()
    images, labels = task.splits["test"]
    task.splits["test"] = images[:100], labels[:100]        # one batch
    sizes, answers = (8, 12, 16, 20, 24), torch.eye(10)[(labels[:100] + torch.arange(100) % 2) % 10]

    class Model(torch.nn.Module):
        def forward(self, some, interpolate):
            assert some.equal(train_vit.draw(images[:100], some.size(-1)))
            shown.add((some.size(-1), interpolate))
            return answers, None

    for pe, ways in (("learned", {True}), ("rope", {True, False})):
        model = Model()
        model.config = train_vit.ViTConfig(pe=pe)
        tables = task.evaluate(model)
        assert [title.split()[4] for title in tables] == ["interpolated,", "extended,"]
        assert all(row == dict.fromkeys(sizes, 50.0) for row in tables.values())
        assert shown == {(size, way) for size in sizes for way in ways}


def test_a_step_looks_at_a_random_share_of_the_patches():
    task = task_of(train_vit, "digits", "--keep", 0.5)
    kept = [task.batch(seeded(i))[2] for i in range(200)]
    assert {len(k) for k in kept} == set(range(8, 17))          # of 16
    assert all(len(k.unique()) == len(k) for k in kept) and torch.equal(kept[0], task.batch(seeded(0))[2])
    assert torch.cat(kept).bincount().min() > 100               # any of them


@pytest.mark.parametrize("shape, dtype", [((40, 6, 5), ">i4"), ((40, 9, 4, 3), "u2"), ((40, 8, 8, 1), "u8"),
                                          ((40, 16, 16), "u4"), ((40, 3, 3), "i1")])
def test_images_of_ones_own(tmp_path, shape, dtype):
    """Grey or in colour, smaller or larger, labelled in any kind of integers."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = write_npz(tmp_path / "own.npz", images=images, labels=(np.arange(40) % 3).astype(dtype))
    found, labels = train_vit.read_images(path, 16)
    assert torch.equal(found.movedim(1, -1), torch.from_numpy(images.reshape(*shape[:3], -1)))
    assert labels.tolist() == [i % 3 for i in range(40)] and labels.dtype == torch.int64
    results = run(train_vit, path, tmp_path / "out", "--steps", 3)
    assert [list(rows["seqpe"][0]) for rows in results.values()] == [[8, 12, 16, 20, 24]] * 2

# ------------------------------------------------------------------------------------------------------------
# README.md

HERE = Path(seqpe.__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_names_only_options_that_exist(capsys):
    for module in (train_lm, train_vit):
        with pytest.raises(SystemExit):
            module.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) | {"--index-url"}
    named = set(re.findall(r"--[a-z][a-z-]+", README))
    assert "--pe" in named and named <= known, named - known


def test_the_readmes_boxes_fit_the_column():
    boxes = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
    assert boxes and max(len(line) for box in boxes for line in box.split("\n")) <= 95


TITLES = {"text": "nats per character", "recall": "% of answers right",
          "images": "% right, the grid interpolated"}


@pytest.mark.parametrize("name", re.findall(r"data/(\w+)\.svg", README))
def test_the_readmes_tables_and_charts_agree(name):
    """A chart drawn of the table has the lines of the chart that is shown."""
    table = rf"^{TITLES[name]}[^\n]*\n\nencoding +\|([^\n]*)\n[-| ]+\n((?:\w+ +\|[^\n]*\n)+)"
    columns, rows = re.findall(table, README, re.M)[-1]
    scores = {}     # two seeds that have this mean and this deviation
    for row in rows.splitlines():
        cells = [(float(m), float(d) / math.sqrt(2)) for m, d in re.findall(r"([\d.]+)±([\d.]+)", row)]
        scores[row.split()[0]] = [dict(zip(columns.split("|"), [m + sign * d for m, d in cells]))
                                  for sign in (-1, 1)]
    drawn = train_lm.chart(TITLES[name], scores)
    shown = (HERE / "data" / f"{name}.svg").read_text(encoding="utf-8")
    (ours, theirs) = ({name: [float(at) for at in re.split("[ ,]", points)] for points, name in re.findall(
        r'points="([^"]+)".*?>(\w+)</text></g>', svg)} for svg in (drawn, shown))
    assert len(ours) == 6 and ours.keys() == theirs.keys()
    assert all(theirs[pe] == pytest.approx(points, abs=0.2) for pe, points in ours.items())


def readme_commands():
    """Every `python train_*.py` of the README: (script, arguments), once for each value of a shell loop."""
    found = set()
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
    for block in blocks + re.findall(r"`([^`\n]+)`", README):
        loops = [[(f"${name}", value) for value in values.split()]
                 for name, values in re.findall(r"for (\w+) in ([^;]+);", block)]
        for script, arguments in re.findall(r"python (train_\w+)\.py\b([^`\n;&]*)", block):
            for values in itertools.product(*loops):
                text = arguments.strip()
                for variable, value in values:
                    text = text.replace(variable, value)
                found.add((script, text))
    return sorted(found)


@pytest.mark.parametrize("name, arguments", readme_commands())
def test_the_readmes_commands_run(name, arguments, tmp_path, monkeypatch):
    """In their small form: the same options, then those of a tiny model."""
    monkeypatch.setattr(train_lm.Text, "n_evaluated", 2)
    monkeypatch.setattr(train_lm.Recall, "n_evaluated", 2)
    monkeypatch.setattr(train_vit, "MAGNIFICATIONS", (1, 1.5))
    module = {"train_lm": train_lm, "train_vit": train_vit}[name]
    small = {**TINY, "steps": 2, "pe-warmup": 2, **({"block-size": 48} if module is train_lm else {})}
    small = [word for option in small.items() for word in (f"--{option[0]}", str(option[1]))]
    arguments = shlex.split(arguments.replace("0,1,2", "0"))
    module.main([*arguments, *small, "--out", str(tmp_path)])
    assert "--bench" in arguments or list(tmp_path.glob("*.svg"))


def test_the_readmes_example_runs_beside_a_copy_of_seqpe_alone(tmp_path):
    (tmp_path / "seqpe.py").write_bytes((HERE / "seqpe.py").read_bytes())
    (tmp_path / "example.py").write_text(EXAMPLE, encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Host(nn.Module):
    """Somebody's GPT: two layers with the README's Attention, and nothing else that knows of positions."""

    def __init__(self, vocab_size, example):
        super().__init__()
        C = example["C"]
        self.tokens = nn.Embedding(vocab_size, C)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.ln = nn.ModuleList(nn.LayerNorm(C) for _ in range(5))
        self.attention = nn.ModuleList(example["Attention"]() for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
                                 for _ in range(2))
        self.positions = example["Positions"]()

    def forward(self, idx, positional):
        x = self.tokens(idx)
        for i in range(2):
            x = x + self.attention[i](self.ln[2 * i](x), *positional)
            x = x + self.mlp[i](self.ln[2 * i + 1](x))
        return self.ln[4](x) @ self.tokens.weight.T


def losses_of_a_host(model, example, text, steps, shifting):
    """Train as the README says; the loss on the same last T characters of T, 2T, 4T and 8T."""
    T, (train, val) = example["T"], text
    plain = torch.arange(T).unsqueeze(-1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 - 0.9 * step / steps)
        batch = train[torch.randint(len(train) - T, (16, 1)) + torch.arange(T + 1)]
        positional = example["for_training"](model.positions, 16) if shifting else model.positions(plain)
        loss = F.cross_entropy(model(batch[:, :-1], positional).flatten(0, 1), batch[:, 1:].flatten())
        (loss + position_regularizers(model.positions.encoder, (T,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses, ends = [], torch.linspace(8 * T + 1, len(val), 64).long().unsqueeze(1)
    for length in (T, 2 * T, 4 * T, 8 * T):
        chars = val[ends + torch.arange(-length - 1, 0)]
        with torch.no_grad():
            logits = model(chars[:, :-1], model.positions(torch.arange(length).unsqueeze(-1)))[:, -T:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), chars[:, -T:].flatten()).item())
    return losses


def test_the_readmes_example_holds_its_loss_beyond_the_training_length(monkeypatch):
    """Pasted into a GPT of two layers, trained for seconds; without start shifting it does not hold it."""
    monkeypatch.syspath_prepend(str(HERE))
    torch.manual_seed(0)
    exec(EXAMPLE, example := {})
    splits = train_lm.read_text("python")
    index = {c: i for i, c in enumerate(sorted(set("".join(splits.values()))))}
    text = [torch.tensor([index[c] for c in splits[name][:10 ** 6]]) for name in ("train", "val")]
    model = Host(len(index), example)
    warm_up(model.positions.encoder, (example["T"],))
    shifted = losses_of_a_host(copy.deepcopy(model), example, text, 300, shifting=True)
    assert shifted[0] < 2.2 and max(shifted) < shifted[0] + 0.03, shifted
    whole = losses_of_a_host(model, example, text, 100, shifting=False)
    assert whole[2] > whole[0] + 0.15, whole

"""The arithmetic of seqpe.py against slow loops in float64, what is promised of it, the path of tensors
between host and GPU, without a GPU; the scripts as a user runs, interrupts and mistypes them; the README.
"""

import errno
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
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # before torch comes: the CPU is tested, beside a GPU, too
import numpy as np          # noqa: E402
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import seqpe
import train_lm
import train_vit
from seqpe import (GPT, ALiBi, LearnedPE, RoPE, SeqPE, SequentialPE, Signal, SinusoidalPE, attend,
                   contrastive_loss, count_channels, distillation_loss, place_windows,
                   position_to_digits, sample_groups, sample_hard_negatives, training_windows, window)
from train_vit import ViT

torch.set_num_threads(1)        # two that wait for each other on a busy machine are many times slower
BOTH = ["seqpe-scalar", "seqpe-mul", "rope", "sinusoidal", "learned", "nope"]
TEXT, IMAGE = [*BOTH, "alibi"], [*BOTH, "rope_mixed"]
FUSIONS = {"scalar": "extend", "mul": "mul"}        # the field of Signal that each one sets


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def drawn(seed, function, *args, **settings):
    """What function returns where torch's own generator starts at seed."""
    torch.manual_seed(seed)
    return function(*args, **settings)


def tokens(*shape, vocab_size=11, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def gpt(encoding="seqpe-scalar", **settings):
    """A small GPT as it starts, for a window of 8 tokens. encoding: "seqpe-mul" is fusion="mul", too."""
    pe, _, fusion = encoding.partition("-")
    sizes = dict(n_layer=2, n_head=2, n_embd=16, max_position=1000, block_size=8, vocab_size=11)
    return GPT(pe=pe, **{**sizes, **({"fusion": fusion} if fusion else {}), **settings})


def vit(encoding="seqpe-scalar", **settings):
    """A small ViT as it starts, for 8 by 8 pixels: a grid of 4 by 4 patches."""
    pe, _, fusion = encoding.partition("-")
    sizes = dict(n_layer=2, n_head=2, n_embd=16, max_position=100, image_size=8, patch_size=2, n_channels=2)
    return ViT(pe=pe, n_classes=5, **{**sizes, **({"fusion": fusion} if fusion else {}), **settings})


def randomized(make, *args, seed=0, **settings):
    """make(...) in float64, every parameter moved: biases of 0 and gains of 1 would hide mistakes."""
    torch.manual_seed(seed)
    module, generator = make(*args, **settings).double(), seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def make_encoder(n_dim=1, max_position=125, **settings):
    return randomized(SeqPE, 16, 2, n_dim=n_dim, max_position=max_position, **settings)


make_gpt, make_vit = partial(randomized, gpt), partial(randomized, vit)
MODELS = [*((gpt, encoding, tokens(3, 8)) for encoding in TEXT),
          *((vit, encoding, randn(3, 2, 8, 8).float()) for encoding in IMAGE)]


def check_gradients(loss, module):
    """Every parameter gets a gradient, a finite one that is not zero."""
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


# ---- Digits, and the encoder that reads them


def slow_digits(number, n_digits):
    return [int(digit) for digit in str(number).zfill(n_digits)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_digits_equal_pythons_arithmetic(dtype):
    assert position_to_digits(torch.tensor([2, 13]), n_digits=2).tolist() == [0, 2, 1, 3]   # as in the paper
    numbers = torch.tensor([[0, 9], [10, 205], [99, min(torch.iinfo(dtype).max, 10 ** 18 - 1)]], dtype=dtype)
    for n_digits in (len(str(numbers.max().item())), 18):
        slow = [sum((slow_digits(n, n_digits) for n in row), []) for row in numbers.tolist()]
        assert position_to_digits(numbers, n_digits).tolist() == slow
        assert position_to_digits(numbers[:0], n_digits).shape == (0, 2 * n_digits)


def slow_linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def slow_layer_norm(x, weights, name):
    scale = weights[name + ".weight"] / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True)) * scale + weights[name + ".bias"]


def slow_attention(x, weights, name, causal, n_head, logit=None):
    """Over one sequence x (T, C), pair by pair; logit(head, q_i, k_j, i, j) if it is not the plain one."""
    (T, C), heads = x.shape, []
    q, k_v = slow_linear(x, weights, name + "query"), slow_linear(x, weights, name + "key_value")
    logit = logit or (lambda head, q_i, k_j, i, j: q_i @ k_j / math.sqrt(C / n_head))
    for head, c in enumerate(torch.arange(C).chunk(n_head)):
        logits = torch.full((T, T), -math.inf, dtype=torch.float64)
        for i, j in itertools.product(range(T), range(T)):
            if j <= i or not causal:
                logits[i, j] = logit(head, q[i, c], k_v[j, c], i, j)
        heads.append(logits.exp() / logits.exp().sum(-1, keepdim=True) @ k_v[:, C + c])
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
        digits = [(d, digit) for d, p in enumerate(position) for digit in slow_digits(p, encoder.n_digits)]
        rows = [weights["symbol.weight"][digit] + weights["place.weight"][place]
                + (weights["dimension.weight"][d] if len(position) > 1 else 0)
                for place, (d, digit) in enumerate(digits)]
        x = torch.stack([*rows, weights["cls"]])
        for layer in range(2):
            x = slow_block(x, weights, f"blocks.{layer}", causal=True, approximate="tanh")
        e = slow_linear(slow_layer_norm(x, weights, "ln")[-1], weights, "proj")
        if encoder.head_norm is not None:
            e = torch.cat([encoder.head_norm * h / (h ** 2).sum().sqrt() for h in e.chunk(encoder.n_head)])
        embeddings.append(e)
    return torch.stack(embeddings)


@pytest.mark.parametrize("n_dim, settings", [
    (1, dict(max_position=20_000)), (1, dict(head_norm=3.0)), (2, dict(head_norm=0.5)), (3, {})])
def test_encoder_is_the_papers_transformer(n_dim, settings):
    """A row for every place; and nothing scales what comes out, unless by head_norm, a head's length."""
    encoder = make_encoder(n_dim, **settings)
    positions = torch.randint(encoder.max_position, (12, n_dim), generator=seeded())
    e = encoder(positions)
    assert_close(e, slow_encoder(encoder, positions), rtol=0, atol=1e-10)
    assert_close(encoder(positions[0]), e[0])       # a single position
    assert encoder(positions.short()).equal(e) and encoder(positions[:0]).shape == (0, 16)
    check_gradients((e * randn(12, 16)).sum(), encoder)


def test_seqpe_starts_as_the_paper_says():
    """N(0, 0.02), layer norms of 1, biases of 0, also where it was made without memory and is drawn anew."""
    with torch.device("meta"):
        encoder = SeqPE(64, n_dim=2).to_empty(device="cpu")
    drawn(0, encoder.apply, seqpe._init_weights)
    for name, parameter in [*encoder.named_parameters(), *drawn(0, SeqPE, 64, n_dim=2).named_parameters()]:
        if parameter.dim() == 1 and name != "cls":
            assert (parameter == (1 if "ln" in name and "weight" in name else 0)).all(), name
        else:
            within = 4 * 0.02 / math.sqrt(parameter.numel())
            assert abs(parameter.mean()) < within and abs(parameter.std() - 0.02) < within, name


@pytest.mark.parametrize("max_position, n_digits", [(1000, 3), (1001, 4), (4, 1), (2 ** 30, 10)])
def test_limit_and_digits_go_together(max_position, n_digits):
    encoder = SeqPE(8, max_position=max_position)
    e = encoder(torch.tensor([[0], [max_position - 1]]))
    assert encoder.n_digits == n_digits and e.isfinite().all() and not e[0].equal(e[1])
    for wrong, named in ((max_position, f"0 to {max_position}"), (-1, "-1 to 0")):
        with pytest.raises(ValueError, match=f"positions {named} .*holds 0 to {max_position - 1};"):
            encoder(torch.tensor([[0], [wrong]]))
        with pytest.raises(IndexError), patch("torch.compiler.is_compiling", return_value=True):
            # Unchecked: past the digits an error, never another number.
            encoder(torch.tensor([[0], [wrong if wrong < 0 else 10 ** n_digits]]))


# ---- Start shifting, and keys that count for gaps


@pytest.mark.parametrize("shape, max_pieces", [((64,), 1), ((64,), 4), ((12, 16), 2), ((2, 3, 4), 2)])
def test_windows_come_in_pieces_that_keep_their_order(shape, max_pieces):
    windows, plain = drawn(0, place_windows, shape, 800, 1000, max_pieces).split([800, 1])
    assert plain[0].equal(window(shape)) and 0 <= windows.min() < 20 and 980 < windows.max() < 1000
    for axis, size in enumerate(shape):
        offsets = (windows - window(shape))[..., axis].view(800, *shape)
        stairs = offsets.movedim(axis + 1, 1).reshape(800, size, -1)
        assert (stairs == stairs[..., :1]).all() and stairs.diff(dim=1).ge(0).all()
        n_pieces = 1 + stairs[..., 0].diff().gt(0).sum(1)
        assert n_pieces.max() <= max_pieces
        for n in range(1, max_pieces + 1) if size >= 12 else ():    # in a short one cuts fall together
            assert (n_pieces == n).sum() > 800 * 0.5 / max_pieces


def test_windows_reach_every_place():
    """Whole, or torn in any way: all combinations of rising positions below the limit, on each axis."""
    rising = set(itertools.combinations(range(6), 3))
    for max_pieces, wanted in ((1, {each for each in rising if each[2] - each[0] == 2}), (3, rising)):
        found = drawn(0, place_windows, (3,), 5000, 6, max_pieces).squeeze(-1)
        assert set(map(tuple, found.tolist())) == wanted
    found = drawn(0, place_windows, (2, 1), 5000, 3, 2).flatten(1)
    rows = itertools.combinations(range(3), 2)
    assert set(map(tuple, found.tolist())) == {(a, x, b, x) for a, b in rows for x in range(3)}


@pytest.mark.parametrize("n_moved", [0, 4, 8])
def test_of_eight_sequences_some_have_a_moved_window_each(n_moved):
    windows, which = drawn(0, training_windows, (6,), 24, 1000, n_moved)
    assert len(windows.unique(dim=0)) == n_moved + 1 and windows[-1].equal(window((6,)))
    assert which.bincount(minlength=n_moved + 1).tolist() == [3] * n_moved + [24 - 3 * n_moved]
    assert which[:8].equal(which[8:16]) and len(drawn(0, training_windows, (6,), 13, 1000, n_moved)[1]) == 13
    alone = [drawn(seed, training_windows, (2, 3), 1, 1000, n_moved)[1].item() for seed in range(200)]
    assert sum(each < n_moved for each in alone) == pytest.approx(200 * n_moved / 8, abs=30)


def slow_counts(positions, share):
    """What is added to the logit of each query and key: share * log(1 + the gap after a piece / its keys)."""
    pieces = [[positions[0]]]
    for before, after in itertools.pairwise(positions):
        pieces = [*pieces, [after]] if after > before + 1 else [*pieces[:-1], pieces[-1] + [after]]
    gaps = [after[0] - piece[-1] - 1 for piece, after in itertools.pairwise(pieces)]
    of = [n for n, piece in enumerate(pieces) for _ in piece]
    return [[share * math.log(1 + gaps[k] / len(pieces[k])) if k < q else 0.0 for k in of] for q in of]


def test_count_channels_equal_a_loop():
    torn = drawn(0, place_windows, (12,), 40, 300, 4)
    torn[0, :, 0] = torch.tensor([5, 6, 7, 100, 101, 0, 1, 9, 10, 3, 3, 4])     # packed texts: positions fall
    torn[1, :, 0] = torch.tensor([0, 3, 9, 19, 39, 59, 60, 99, 110, 200, 201, 202])     # nine pieces
    channels = drawn(1, count_channels, torn, 12)
    assert channels.shape == (41, 2, 1, 12, 8) and channels.isfinite().all()
    logits = (channels[:, 0] @ channels[:, 1].mT).squeeze(1) / math.sqrt(12)
    shares = drawn(1, torch.rand, 41).tolist()
    slow = [slow_counts(*each) for each in zip(torn.squeeze(-1).tolist(), shares)]
    assert_close(logits, torch.tensor(slow))
    assert logits.amax((1, 2)).gt(0.1).sum() > 15 and logits[-1].eq(0).all()    # many are torn, not the last


@pytest.mark.parametrize("encoding", TEXT)
def test_counting_adds_a_mask_to_attention(encoding):
    model, idx, which = make_gpt(encoding), tokens(3, 8), torch.tensor([2, 0, 1])
    windows = drawn(2, place_windows, (8,), 2, 1000)
    counted = model(idx, signals=drawn(1, model.pe, windows, which, True))[0]
    shares = drawn(1, torch.rand, 3).tolist()
    mask = torch.tensor([slow_counts(*each) for each in zip(windows.squeeze(-1).tolist(), shares)])[which]
    signals = model.pe(windows, which)
    assert (counted - model(idx, signals=signals)[0]).abs().max() > 0.01
    with patch("seqpe.attend", partial(attend, mask=mask.unsqueeze(1))):
        assert_close(counted, model(idx, signals=signals)[0], rtol=0, atol=1e-4)


# ---- The two extra losses


def single_edits(digits):
    """What a tuple of K digits becomes by an edit, each result as often as it is drawn of 360 K * K."""
    n, ways = len(digits), Counter()
    for at in range(n):
        ways[(0, *digits[:at], *digits[at + 1:])] += 90 * n
        for new in range(10):
            ways[(*digits[1:at + 1], new, *digits[at + 1:])] += 9 * n
            ways[(*digits[:at], new, *digits[at + 1:])] += 10 * n if new != digits[at] else 0
        for other in range(n):
            swapped = list(digits)
            swapped[at], swapped[other] = digits[other], digits[at]
            ways[tuple(swapped)] += 90
    return ways


@pytest.mark.parametrize("n_dim, n_digits, pivot", [(1, 4, [2345]), (2, 2, [18, 9]), (1, 1, [3])])
def test_hard_negatives_are_one_to_three_edits_away(n_dim, n_digits, pivot):
    encoder, pivots, n = SeqPE(8, n_dim=n_dim, max_position=10 ** n_digits), torch.tensor([pivot]), 40000
    found = drawn(0, sample_hard_negatives, encoder, pivots, n).squeeze(0)
    start, *found = map(tuple, position_to_digits(torch.cat([pivots, found]), n_digits).tolist())
    found, reached = Counter(found), [{start}]      # after 0, 1, 2, 3 edits
    for _ in range(3):
        reached.append({result for digits in reached[-1] for result in single_edits(digits)})
    assert set(found) <= reached[3] and (n_digits < 4 or set(found) & (reached[3] - reached[2]))
    # A third are edited once, each kind of edit as likely as any other; more edits can only add to these.
    once = single_edits(start)
    assert all(found[each] > 0.5 * n / 3 * ways / once.total() for each, ways in once.items())


def test_ours_draws_candidates_around_the_pivot_or_anywhere():
    groups = drawn(0, sample_groups, SeqPE(8, max_position=10 ** 7), 2000, 32).squeeze(-1)
    assert 0 <= groups.min() and groups.max() < 10 ** 7
    extent = groups[:, 1:].amax(1) - groups[:, 1:].amin(1)
    for size in (64, 1000, 10 ** 5):    # the share of windows below it: small ones are the likeliest
        share = 0.8 * math.sqrt(math.log(size / 4) / math.log(10 ** 7 / 4))
        assert (extent < size).double().mean() == pytest.approx(share, abs=0.04)
    below = (groups[:, 1:] < groups[:, :1])[extent < 10 ** 5].double()
    assert below.mean() == pytest.approx(0.5, abs=0.07) and below.mean(1).std() > 0.2     # anywhere around it


@pytest.mark.parametrize("n_dim, max_position, M, n_hard, shares", [(1, 20_000, 32, 8, (0.4, 0.6)),
                                                                    (2, 100, 64, 12, (0.3, 0.2))])
def test_the_papers_groups_are_as_in_the_authors_code(n_dim, max_position, M, n_hard, shares):
    """Some groups have true hard negatives, some are in a box of 256 positions anywhere, others are plain."""
    hard, encoder = [], SeqPE(8, n_dim=n_dim, max_position=max_position)
    listed = lambda *args: hard.append(sample_hard_negatives(*args)) or hard[0]     # noqa: E731
    with patch("seqpe.sample_hard_negatives", listed):
        groups = drawn(0, sample_groups, encoder, 4000, M, True)
    assert 0 <= groups.min() and groups.max() < max_position and hard[0].size(1) == n_hard
    pivots, candidates, side = groups[:, :1], groups[:, 1:], {1: 256, 2: 16}[n_dim]
    low, high = candidates.amin(1), candidates.amax(1)                                  # (P, n_dim)
    boxed = (high - low < side).all(-1)
    assert boxed.double().mean() == pytest.approx(shares[1], abs=0.03)
    assert (high - low)[boxed].max() == side - 1
    inside = ((low <= pivots[:, 0]) & (pivots[:, 0] <= high)).all(-1)[boxed].double().mean()
    assert inside == pytest.approx((side / max_position) ** n_dim, abs=0.015)           # anywhere
    distance = (candidates - pivots).pow(2).sum(-1).masked_fill((candidates == pivots).all(-1), 2 ** 60)
    is_hard = (candidates[:, :n_hard] == hard[0]).all(-1)                               # (P, n_hard)
    assert is_hard.any(1).double().mean() == pytest.approx(shares[0], abs=0.03)
    nearest = distance.argmin(1, keepdim=True)
    assert F.pad(is_hard, (0, M - n_hard)).gather(1, nearest).double().mean() < 0.005
    if n_dim == 1:      # as far as in the authors' code
        groups = drawn(0, sample_groups, SeqPE(8, max_position=2048), 20_000, 32, True).squeeze(-1)
        distance = (groups[:, 1:] - groups[:, :1]).abs()
        assert abs(distance.masked_fill(distance == 0, 2048).amin(1).median() - 94) < 8


def slow_contrastive_loss(e, positions, n_head, n_pivots):
    """The nearest is not a copy, nor are its rivals, which are further away."""
    losses = []
    for e_group, group in zip(e, positions.tolist()):
        for i, pivot in enumerate(group[:n_pivots]):
            distance = [sum((a - b) ** 2 for a, b in zip(position, pivot)) for position in group]
            nearest = distance.index(min(d for d in distance if d))
            rivals = [j for j, d in enumerate(distance) if j == nearest or d > distance[nearest]]
            for e_head in e_group.chunk(n_head, dim=-1):
                logits = e_head[rivals] @ e_head[i]
                losses.append(logits.logsumexp(0) - logits[rivals.index(nearest)])
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("n_head, paper", [(3, False), (2, True), (1, False)])
@pytest.mark.parametrize("n_dim, highest", [(1, 12), (2, 4), (3, 2 ** 30)])
def test_contrastive_loss_equals_a_loop(n_dim, highest, n_head, paper):
    """The paper's, of one pivot and whole vectors, and ours; with copies of the pivot, and ties."""
    positions, e = tokens(6, 15, n_dim, vocab_size=highest), randn(6, 15, 6).requires_grad_()
    if highest > 100:       # rivals that only exact integers tell apart
        positions = highest - 1 - positions % 100
        positions[:, ::2] %= 100
    else:
        positions[0, :5] = torch.tensor([2, 2, 1, 3, 3]).unsqueeze(-1)
    loss = contrastive_loss(e, positions, n_head, paper)
    slow = slow_contrastive_loss(e.detach(), positions, *((1, 1) if paper else (n_head, 15)))
    assert loss.shape == () and loss.item() == pytest.approx(slow)
    loss.backward()
    assert e.grad.isfinite().all()


def slow_distillation_loss(e_teacher, e_students, n_head):
    losses = []
    for student, c in itertools.product(e_students, torch.arange(e_teacher.size(-1)).chunk(n_head)):
        t, s = (F.log_softmax(e[:, c] @ e[:, c].T, dim=-1) for e in (e_teacher, student))
        losses += [t_i.exp() @ (t_i - s_i) + s_i.exp() @ (s_i - t_i) for t_i, s_i in zip(t, s)]
    return torch.stack(losses).mean()


def test_distillation_loss_equals_a_loop_and_teaches_only_the_students():
    e = randn(4, 7, 8).requires_grad_()         # the teacher's last
    for n_head, paper in ((1, False), (4, False), (2, True)):
        loss = distillation_loss(e, n_head, paper)
        assert_close(loss, slow_distillation_loss(e[-1], e[:-1], n_head) / (7 if paper else 1))
    loss.backward()
    assert e.grad.count_nonzero(dim=(1, 2)).tolist() == [56, 56, 56, 0]


@pytest.mark.parametrize("shape, paper", [((40,), False), ((40,), True), ((4, 5), False), ((4, 5), True)])
@pytest.mark.parametrize("near, far", [(0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_loss_is_that_of_both(shape, paper, near, far):
    """Of groups, and of windows that each stand elsewhere as a whole, at some places; read in one call."""
    pe, read = randomized(SequentialPE, 2, 8, shape, 125), []
    pe.encoder.register_forward_hook(lambda _, args, e: read.append((args[0], e.detach())))
    loss = drawn(7, pe.loss, near, far, 6, paper)
    ours = (6, 33, 5, min(32, math.prod(shape)))
    P, N, S, m = ours if not paper else (16, 33, 17, 32) if len(shape) == 1 else (32, 65, 33, 20)
    (groups, windows), (e_groups, e_windows) = (
        (t[:P * N].unflatten(0, (P, N)), t[P * N:].unflatten(0, (S, m))) for t in read.pop())
    offsets = windows - windows[-1]
    assert offsets.eq(offsets[:, :1]).all() and len(offsets.unique(dim=0)) > S / 2 and not read
    chosen = set(map(tuple, windows[-1].tolist()))
    assert len(chosen) == m and chosen <= set(map(tuple, window(shape).tolist()))
    slow = near * slow_contrastive_loss(e_groups, groups, *((1, 1) if paper else (2, N)))
    slow += far * slow_distillation_loss(e_windows[-1], e_windows[:-1], 2).item() / (m if paper else 1)
    assert loss.item() == pytest.approx(slow)
    check_gradients(loss, pe.encoder)


# ---- Attention, the encodings, GPT and ViT; the GPU path without a GPU, errors, and sections of the file


ATTEND = {      # name: (heads of keys, queries, causal, mask)
    "plain": (4, 7, True, None), "grouped": (2, 7, True, None), "the last three": (4, 3, True, None),
    "one, grouped": (1, 1, True, None), "images": (4, 7, False, None),
    "numbers": (4, 7, True, randn(2, 1, 7, 7, seed=9)), "of the last": (2, 3, True, randn(3, 7, seed=9)),
    "booleans": (4, 7, True, torch.arange(7) > torch.tensor([[2], [0]])[:, None, None] - 1),
    "padding": (2, 7, False, (torch.arange(7) < 5).expand(7, 7)),
}


@pytest.mark.parametrize("n_kv_head, T, causal, mask", ATTEND.values(), ids=ATTEND)
def test_attend_equals_a_loop(n_kv_head, T, causal, mask):
    """The position term beside the content, over its scale; masks of both kinds; the last queries."""
    q, k, v = randn(2, 4, T, 6), randn(2, n_kv_head, 7, 6, seed=1), randn(2, n_kv_head, 7, 6, seed=2)
    eq, ek = randn(4, T, 3, seed=3), randn(4, 7, 3, seed=4)
    y, group = attend(q, k, v, eq, ek, mask, causal), 4 // n_kv_head
    for b, h, i in itertools.product(range(2), range(4), range(T)):
        logits = []
        for j in range(7):
            logit = (q[b, h, i] @ k[b, h // group, j] + eq[h, i] @ ek[h, j]) / math.sqrt(6)
            m = 0.0 if mask is None else mask.expand(2, 1, T, 7)[b, 0, i, j].item()
            added = m if isinstance(m, float) else 0.0 if m else -math.inf
            logits.append(-math.inf if causal and j > i + 7 - T else float(logit) + added)
        p = torch.tensor(logits, dtype=torch.float64).softmax(0).nan_to_num()   # 0 where nothing is seen
        assert_close(y[b, h, i], p @ v[b, h // group], rtol=0, atol=1e-10)
    assert mask is not None or not torch.allclose(y, attend(q, k, v, causal=causal))
    assert attend(q[:0], k[:0], v[:0], eq, ek, None, causal).shape == (0, 4, T, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_nothing_are_zero(dtype, causal):
    """Also where the mask is the sum of two planes of the least number there is."""
    q, k, v, eq, ek = randn(5, 2, 2, 6, 8).to(dtype)
    seen = torch.arange(6)[:, None].expand(6, 6) > 2
    hidden = torch.zeros(6, 6, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    for mask in (seen, hidden + hidden):
        y = attend(q, k, v, eq, ek, mask, causal)
        assert y[..., :3, :].eq(0).all() and y.isfinite().all()
        assert_close(y[..., 3:, :], attend(q, k, v, eq, ek, None, causal)[..., 3:, :])


SOME = torch.tensor([[0], [3], [4], [9], [250], [260], [700]])
GRID = torch.tensor([[0, 0], [0, 3], [2, 1], [7, 5], [3, 9]])
Q = randn(1, 4, 7, 6)


def check_attention(model, positions, logit, atol=1e-10):
    """Each layer's attention under the model's signals is one with logit(layer, head, q_i, k_j, i, j)."""
    x, first = randn(len(positions), model.ln.weight.numel(), seed=3), int(model.pe.class_token)
    signals = model.pe(positions)
    for layer, (block, signal) in enumerate(zip(model.blocks, signals * (2 // len(signals)), strict=True)):
        attn = block.attn
        slow = slow_attention(x, attn.state_dict(), "", attn.causal, attn.n_head, partial(logit, layer))
        signal = Signal(*(t if t is None else t[..., first:, :] for t in signal))   # without a class token's
        fast = attn(x.unsqueeze(0), signal).squeeze(0)
        assert_close(fast, slow, rtol=0, atol=atol)
        assert (fast - attn(x.unsqueeze(0))).abs().max() > 0.01      # the encoding has a say


@pytest.mark.parametrize("n_head, slopes", [
    (2, [1 / 16, 1 / 256]), (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])])
def test_alibi_adds_to_attention(n_head, slopes):
    """The slopes of Press et al. for any number of heads; far away, too, positions are not rounded."""
    model, far = make_gpt("alibi", n_head=n_head, n_embd=8 * n_head), torch.arange(9900, 9999)[:, None]
    check_attention(model, SOME, atol=1e-4, logit=lambda layer, head, q, k, i, j: (
        q @ k / math.sqrt(8) - slopes[head] * float(SOME[i] - SOME[j])))
    assert model.pe(far)[0].extend[1].bfloat16().float().sum(-1).equal(far.T.expand(n_head, -1).float())


@pytest.mark.parametrize("make, positions", [(make_gpt, SOME), (make_vit, GRID)], ids=["GPT", "ViT"])
@pytest.mark.parametrize("fusion, settings", [("scalar", {}), ("mul", {}),
                                              ("scalar", dict(pe_embd=6, head_norm=3.0))])
def test_seqpe_enters_attention_as_the_paper_writes(make, positions, fusion, settings):
    model = make(f"seqpe-{fusion}", **settings)
    e = slow_encoder(model.pe.encoder, positions)
    assert (e.size(-1), model.pe.encoder.head_norm) == ((6, 3.0) if settings else (16, 6.0))

    def logit(layer, head, q, k, i, j):
        W = model.pe.maps[0 if fusion == "scalar" else layer]
        e_q, e_k = (W(e[end]).detach().chunk(4)[2 * way + head] for way, end in enumerate((i, j)))
        return (q @ k + e_q @ e_k if fusion == "scalar" else (q * e_q) @ (k * e_k)) / math.sqrt(8)

    check_attention(model, positions, logit)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("head_dim", [8, 24])
def test_seqpe_starts_by_looking_near_and_far(fusion, head_dim):
    """eq_i . ek_j / sqrt(D) is g * e_i . e_j, in one head more than in the next; mul starts with e itself."""
    pe = drawn(0, SequentialPE, 4, head_dim, (8,), 100, 3, fusion=fusion)
    e = pe.encoder(window((9,))).unflatten(-1, (4, -1)).transpose(0, 1)         # (H, T, E/H)
    g = torch.tensor([1, 1 / 4, 1 / 16, 1 / 64])[:, None, None]
    signals = pe(window((9,)))
    assert len(signals) == len(pe.maps) == (1 if fusion == "scalar" else 3)
    for signal in signals:
        eq, ek = getattr(signal, FUSIONS[fusion])
        assert_close(*((eq, e) if fusion == "mul" else (eq @ ek.mT / math.sqrt(head_dim), g * (e @ e.mT))))
        assert eq.equal(ek)
    pe = drawn(0, SequentialPE, 4, head_dim, (8,), 100, 3, fusion=fusion, diagonal_maps=False)
    assert all(abs(W.weight.std() - 0.02) < 0.002 and W.bias.eq(0).all() for W in pe.maps)


def test_other_initial_values():
    for head_norm, std in ((6.0, 1.0), (None, 0.02)):
        pe = drawn(0, SequentialPE, 4, 128, (4, 4), 100, class_token=True, fusion="mul", head_norm=head_norm)
        assert pe.cls.std().item() == pytest.approx(std, rel=0.1) and abs(pe.cls.mean()) < std / 5
    pe = drawn(0, LearnedPE, 4, 128, (4, 4), 10, class_token=True)
    assert_close(torch.stack([pe.cls.std(), pe.table.std()]), torch.full((2,), 0.02), rtol=0.1, atol=0)
    assert_close(SinusoidalPE(2, 8, (8,), 100)(window((1,)))[0].input, torch.tensor([[0.0] * 8 + [0.1] * 8]))
    for name, weight in drawn(0, gpt, n_embd=64, n_layer=4).blocks.named_parameters():
        if weight.dim() == 2:       # GPT-2's, for 8 additions
            std = 0.02 / math.sqrt(8) if name.endswith(("attn.proj.weight", "mlp.2.weight")) else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05)
    x, y = drawn(0, vit, "rope_mixed", n_head=4, n_embd=64).pe.learned.detach().chunk(2, dim=-1)
    assert_close((x * y).sum(2), torch.zeros(2, 4, 4), rtol=0, atol=1e-6)       # two axes at right angles
    lengths = (100 ** (-torch.arange(4) / 4)).expand(2, 4, 4)
    assert_close((x.norm(dim=2), y.norm(dim=2)), (lengths, lengths))
    assert len(torch.atan2(*x[..., 0].unbind(2)).unique()) == 8
    loss = partial(drawn, 1, SequentialPE(2, 8, (8,), 100).loss)        # the paper's weights of the two
    near, far = (loss(contrast_weight=n, distill_weight=1 - n, n_groups=4) for n in (1, 0))
    assert_close(loss(), 0.1 * near + 0.1 * far)


def turned(x, angles):
    """RoPE as complex numbers: the pair of channels (c, c + D/2) is one."""
    z = torch.complex(*x.chunk(2)) * torch.tensor(angles, dtype=torch.float64).mul(1j).exp()
    return torch.cat([z.real, z.imag])


def slow_angles(model, layer, head, position):
    """The angles of the D/2 = 4 pairs at a position, a list of numbers."""
    if model.encoding == "rope_mixed":      # pair c looks at both coordinates, at learned frequencies
        frequency = model.pe.learned[layer, head].tolist()
        return [sum(frequency[d][c] * p for d, p in enumerate(position)) for c in range(4)]
    if len(position) == 1:
        return [position[0] * 10000 ** (-c / 4) for c in range(4)]
    return [p * 100 ** (-c / 2) for p in position for c in range(2)]    # half of the pairs for each


@pytest.mark.parametrize("pe, make, positions", [("rope", make_gpt, SOME), ("rope", make_vit, GRID),
                                                 ("rope_mixed", make_vit, GRID)])
def test_rope_turns_queries_and_keys(pe, make, positions):
    def logit(layer, head, q, k, i, j):
        a_q, a_k = (slow_angles(model, layer, head, positions[at].tolist()) for at in (i, j))
        return turned(q, a_q) @ turned(k, a_k) / math.sqrt(8)

    model = make(pe)
    check_attention(model, positions, logit, atol=2e-4)     # angles are kept in float32


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
@pytest.mark.parametrize("make, positions", [(make_gpt, SOME), (make_vit, GRID)], ids=["GPT", "ViT"])
def test_input_encodings_are_added_once(encoding, make, positions):
    pe, n = make(encoding).pe, 8 // positions.size(1)
    first, second = pe(positions)
    if encoding == "learned":
        slow = torch.stack([pe.table[tuple(position)] for position in positions.tolist()])
    else:       # each coordinate has its share of the channels: sines, then cosines
        slow = torch.tensor([[wave(p * 10000 ** (-c / n)) for p in position for wave in (math.sin, math.cos)
                              for c in range(n)] for position in positions.tolist()]) * pe.input_gain.item()
    slow = slow if pe.cls is None else torch.cat([pe.cls[None], slow])
    assert_close(first.input, slow, rtol=0, atol=1e-4, check_dtype=False)
    assert second == Signal() and first == Signal(input=first.input)


@pytest.mark.parametrize("encoding", TEXT)
def test_no_matrix_of_all_pairs_is_kept_for_the_gradients(encoding):
    T, shapes = 512, []
    model, idx = drawn(0, gpt, encoding, n_layer=1, block_size=T), tokens(2, T)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        signals = drawn(1, lambda: model.pe(*training_windows((T,), 2, 1000), count=True))
        n_of_encoding = len(shapes)
        model(idx, idx, signals)[1].backward()
    assert len(shapes) > n_of_encoding and not [shape for shape in shapes if shape.count(T) > 1]
    assert max(shape.numel() for shape in shapes[n_of_encoding:]) < T * T


def slow_resize(grid, new):
    """(*old, E) -> (*new, E), linear along each axis, between the centres of the cells."""
    for axis, n in enumerate(new):
        old, grid = grid.size(axis), grid.movedim(axis, 0)
        places = [min(max((i + 0.5) * old / n - 0.5, 0), old - 1) for i in range(n)]
        grid = torch.stack([torch.lerp(grid[int(p)], grid[min(int(p) + 1, old - 1)], p % 1) for p in places])
        grid = grid.movedim(0, axis)
    return grid


@pytest.mark.parametrize("make, encoding, new", [
    *((make_gpt, encoding, new) for encoding in TEXT for new in ((16,), (5,), (8,))),
    *((make_vit, encoding, new) for encoding in IMAGE for new in ((8, 12), (6, 3)))])
def test_a_window_is_stretched_over_another(make, encoding, new):
    """Relative encodings get positions in between, past the ends as well; embeddings are interpolated."""
    model = make(encoding)
    pe, signals, old, first = model.pe, model.pe.interpolate(new), model.shape, int(model.pe.class_token)
    places = list(itertools.product(*([(i + 0.5) * o / n - 0.5 for i in range(n)] for o, n in zip(old, new))))
    for layer, signal in enumerate(signals if "rope" in encoding else []):
        slow = torch.tensor([[slow_angles(model, layer, head, place) for place in places]
                             for head in range(signal.rotate.size(-3))])
        assert_close(signal.rotate[..., first:, :], torch.stack([slow.cos(), slow.sin()]), rtol=0, atol=1e-5)
    if encoding == "alibi":
        assert_close(signals[0].extend[1].sum(-1), torch.tensor(places).T.expand(2, -1), rtol=0, atol=1e-4)
    if hasattr(pe, "embed"):
        e = pe.embed(window(old)).unflatten(0, old)
        e = slow_resize(e, new) if make is make_gpt else (
            F.interpolate(e.movedim(-1, 0)[None], size=new, mode="bicubic")[0].movedim(0, -1))
        e = torch.cat([pe.cls[None], e.flatten(0, -2)]) if first else e.flatten(0, -2)
        for a, b in zip(tree_leaves(signals), tree_leaves(pe.fuse(e)), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=0, atol=1e-6)
    if make is make_gpt:
        logits, plain = model(tokens(2, *new), signals=signals)[0], model(tokens(2, *new))[0]
        assert torch.allclose(logits, plain, atol=1e-5) == (new == old or encoding == "nope")


def test_windows_of_three_dimensions():
    """Videos: trained as texts and images are, and interpolated linearly along each axis."""
    pe = randomized(SequentialPE, 2, 8, (2, 3, 4), 60)
    e = slow_resize(pe.embed(window((2, 3, 4))).view(2, 3, 4, 16), (4, 3, 9)).flatten(0, 2)
    assert_close(pe.interpolate((4, 3, 9))[0].extend, pe.fuse(e)[0].extend)
    parts = torch.stack(pe.for_training(16))
    check_gradients((parts * randn(2, 16, 2, 24, 8)).sum() + pe.loss(), pe)


@pytest.mark.parametrize("make, x, targets", [(make_gpt, tokens(2, 7), tokens(2, 7, seed=1)),
                                              (make_vit, randn(2, 2, 6, 4), torch.tensor([[4], [0]]))])
def test_models_are_plain_transformers(make, x, targets):
    model, losses = make("nope"), []
    weights, (logits, loss) = model.state_dict(), model(x, targets.squeeze(1))
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
        losses += [-math.log(p[target]) for p, target in zip(h.softmax(-1), wanted)]
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
        assert (other[0, t:] - logits[0, t:]).abs().amax(1).min() > 1e-4
    check_gradients(model(idx, tokens(2, 8, seed=1))[1], model)


@pytest.mark.parametrize("make, encoding, x", MODELS)
def test_positions_of_a_batch_are_those_of_each_sequence(make, encoding, x):
    model = randomized(make, encoding)
    plain, x = window(model.shape), x if make is gpt else x.double()
    positions, logits = torch.stack([plain.roll(i, 0) for i in (3, 0, 3)]), model(x)[0]     # some the same
    together = model(x, signals=model.pe(positions))[0]
    assert_close(model(x, signals=model.pe(positions[:2], torch.tensor([0, 1, 0])))[0], together)
    for b in range(3):
        assert_close(together[b:b + 1], model(x[b:b + 1], signals=model.pe(positions[b]))[0])
    assert_close(model(x, signals=model.pe(plain))[0], logits)
    assert torch.allclose(together[::2], logits[::2]) == (encoding == "nope")
    for start in (250, 5000) if make is gpt and encoding in ("rope", "alibi") else ():
        assert_close(model(x, signals=model.pe(plain + start))[0], logits, rtol=0, atol=2e-3)


@pytest.mark.parametrize("make, encoding, x", MODELS)
def test_positions_that_do_not_fit_are_refused(make, encoding, x):
    """By shape, at the encoding; by number and by sequences, at the model: never in silence."""
    model, plain = make(encoding), window(make("nope").shape)
    T, n = plain.shape
    for wrong in ((T,), (1, T), (T, T), (2, T), (3, T, 3), (T, 3), (1, 3, T, n), (T, n)):
        with pytest.raises(ValueError, match=rf"\.\.\., T, {n}"):   # the last one for sequences that share it
            model.pe(torch.zeros(wrong).long(), torch.tensor([0, 0]) if wrong == (T, n) else None)
    calls = [model.pe(torch.stack(each)) for each in ([plain[:3]] * 3, [plain] * 2) if encoding != "nope"]
    for signals in [*calls, model.pe(plain) * 3]:
        with pytest.raises((ValueError, RuntimeError)):
            model(x, signals=signals)


@pytest.mark.parametrize("encoding", IMAGE)
def test_images_of_any_size(encoding):
    """Their patches are at row and column, in an oblong image, too, and those not kept have no say."""
    model, upper = make_vit(encoding), torch.randperm(8, generator=seeded())    # two rows of four patches
    x, rows = randn(4, 2, 8, 8), torch.tensor([[y, x] for y in range(2) for x in range(4)])
    assert_close(model(x[:, :, :4], signals=model.pe(rows))[0], model(x[:, :, :4])[0])
    assert_close(model(x, kept=upper)[0], model(x[:, :, :4])[0])
    some, all_ = (model.pe(torch.stack([part + i for i in (0, 1, 0, 2)])) for part in (rows[upper], rows))
    assert_close(model(x, signals=some, kept=upper)[0], model(x[:, :, :4], signals=all_)[0])
    check_gradients(model(x, torch.tensor([0, 1, 2, 3]))[1], model)


@pytest.mark.parametrize("make, encoding, x", MODELS)
def test_models_on_a_device(make, encoding, x):
    """Tensors without content, `meta` is the device: neither mixed nor read, in training and later."""
    model, targets = make(encoding).to("meta"), tokens(3, 8) if make is gpt else tokens(3)
    with FakeTensorMode(allow_non_fake_inputs=True), patch("torch.compiler.is_compiling", lambda: True):
        windows, which = training_windows(model.shape, 3, 100)
        moved = (model.pe(each, which, make is gpt) for each in (windows, windows.to("meta")))
        for signals in (None, *moved, model.pe.interpolate(model.shape)):
            loss = model(x.to("meta"), targets.to("meta"), signals)[1]
            (loss + model.pe.loss() if "seqpe" in encoding else loss).backward()


@pytest.mark.parametrize("encoding", TEXT)
def test_nothing_hangs_on_buffers(encoding):
    """What is computed in forward is right after to_empty, too."""
    with torch.device("meta"):
        other = gpt(encoding).to_empty(device="cpu")
    model, idx = drawn(0, gpt, encoding), tokens(2, 8)
    other.load_state_dict(model.state_dict())
    assert not list(model.buffers()) and other(idx)[0].equal(model(idx)[0])


# ---- SeqPE in another's model, and the training step at the end of the file


@pytest.mark.parametrize("shape", [(16,), (4, 4)])
def test_pretraining_starts_anew_and_lowers_the_losses(shape):
    def pretrained(left, *steps, **settings):
        pe = SequentialPE(2, 8, shape, 60, 2, class_token=True)
        for parameter in pe.parameters():
            parameter.data.fill_(left)
        drawn(1, pe.pretrain, *steps, **settings)
        return pe, drawn(9, pe.loss, contrast_weight=1.0, n_groups=32).item()

    (pe, first), (other, _), seen = pretrained(math.nan, 2), pretrained(2e30, 2), []
    for (name, a), b in zip(pe.named_parameters(), other.parameters()):
        assert a.isfinite().all() and a.equal(b) and a.grad is None, name
    _, last = pretrained(0.0, 60, progress=lambda steps: seen.append(steps) or steps)
    assert last < 0.9 * first and seen == [range(60)]


@pytest.mark.parametrize("factor", [0.0, math.nan])
def test_pretraining_that_learns_nothing_is_an_error(factor):
    pe = drawn(0, SequentialPE, 2, 8, (8,), 100)
    with patch.object(pe, "loss", lambda **_: 3.0 + factor * pe.encoder.cls.sum()):
        pe.pretrain(99)
        with pytest.raises(ValueError, match="learns nothing: its loss was .* and is (3.000|nan)"):
            pe.pretrain(100)


def test_seqpe_serves_another_model():
    """With heads of any size: what to append for training, drawn anew each time, and for reading."""
    pe, images = randomized(SequentialPE, 4, 24, (8,), 1000), SequentialPE(4, 24, (2, 3), 100)
    (q, k, v), plain, (eq, ek) = randn(3, 16, 4, 8, 24), pe.for_reading(8), drawn(1, pe.for_training, 16)
    assert eq.shape == ek.shape == (16, 4, 8, 8 + 8) and plain[0].shape == (4, 8, 8)
    is_plain = [b for b in range(16) if torch.allclose(eq[b, ..., :8], plain[0])]
    assert len(is_plain) == 8 and len(eq.detach().unique(dim=0)) == 5
    assert_close(attend(q, k, v, eq, ek)[is_plain], attend(q, k, v, *plain)[is_plain])      # no gap, no count
    assert [t.shape for t in pe.for_training(3, count=False)] == 2 * [(3, 4, 8, 8)]
    assert images.for_training(5)[0].shape == (5, 4, 6, 8) and images.for_reading(4, 5)[1].shape == (4, 20, 8)
    losses = [attend(q, k, v, *drawn(seed, pe.for_training, 16)).square().sum() for seed in (1, 2)]
    apart = [torch.autograd.grad(loss, list(pe.parameters()), retain_graph=True) for loss in losses]
    for loss in losses:     # the gradients of two passes add up
        check_gradients(loss, pe)
    for parameter, *both in zip(pe.parameters(), *apart):
        assert torch.allclose(parameter.grad, sum(both)) and not torch.allclose(*both)


@pytest.mark.parametrize("change", [partial(torch.compile, fullgraph=True, backend="eager"),
                                    lambda step: partial(checkpoint, step, use_reentrant=False)])
def test_a_training_step_may_be_compiled_whole_or_checkpointed(change):
    """Windows and dropout are drawn again as they were."""
    def step(*qkv):
        return attend(*qkv, *pe.for_training(16)).square().mean() + pe.loss()

    pe, qkv = drawn(0, SequentialPE, 2, 8, (8,), 100, pe_dropout=0.3), randn(3, 16, 2, 8, 8).float()
    losses = [drawn(3, each, *qkv) for each in (step, change(step))]
    grads = [drawn(4, torch.autograd.grad, loss, list(pe.encoder.parameters())) for loss in losses]
    assert all(map(torch.allclose, *grads)) and losses[0].isclose(losses[1])


@pytest.mark.parametrize("encoding", ["seqpe-scalar", "rope", "alibi"])
def test_a_model_is_exported_for_any_batch(encoding):
    model, B, T = drawn(0, gpt, encoding), torch.export.Dim("B", max=100), torch.export.Dim("T", max=900)
    exported = torch.export.export(model, (tokens(2, 9),), dynamic_shapes=({0: B, 1: T},)).module()
    assert_close(exported(tokens(3, 14))[0], model(tokens(3, 14))[0])


def test_the_training_step_at_the_end_of_the_file_runs():
    """As it is written; and the file needs nothing but torch."""
    text = Path(seqpe.__file__).read_text(encoding="utf-8")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    assert "torch" in imported and imported <= {"torch", *sys.stdlib_module_names}
    sketch = re.findall(r"^#  +(.*)$", text.split("# A training step")[1], re.MULTILINE)
    model, idx, targets = gpt(block_size=128), tokens(32, 128), tokens(32, 128, seed=1)
    names = {**vars(seqpe), "model": model, "idx": idx, "targets": targets}
    drawn(0, exec, "\n".join(sketch), names)
    assert names["loss"].isfinite() and names["loss"] > 0 and len(sketch) >= 3
    check_gradients(names["loss"], model)


ERRORS = {
    "float positions": (lambda: SeqPE(8)(torch.ones(3, 1)), RuntimeError, "type"),
    "last dimension": (lambda: SeqPE(8, n_dim=2)(torch.zeros(4, 3).long()), ValueError, r"n_dim=2.*\(4, 3\)"),
    "too many positions": (lambda: SeqPE(8, max_position=2 ** 30 + 1), ValueError, r"2\*\*30"),
    "too few positions": (lambda: SeqPE(8, max_position=3), ValueError, "max_position=3 .* 4 to"),
    "width of heads": (lambda: gpt(n_head=3), ValueError, "n_embd=16 .*n_head=3"),
    "learned: past the limit": (lambda: gpt("learned")(tokens(1, 1001)), IndexError, "1000"),
    "rope: odd heads": (lambda: RoPE(2, 9, (8,), 100)(SOME), ValueError, "=9 divisible by 2"),
    "sinusoidal": (lambda: SinusoidalPE(3, 6, (4, 4), 100), ValueError, "n_embd=18 divisible by 4"),
    "alibi: images": (lambda: ALiBi(2, 8, (4, 4), 100)(GRID), ValueError, "alibi is for text"),
    "alibi: class token": (lambda: ALiBi(2, 8, (4,), 9, 1, True)(SOME), ValueError, "no class token"),
    "window too long": (lambda: place_windows((9,), 8, 8), ValueError, r"\(9,\) .*max_position=8"),
    "ek of one key": (lambda: attend(*randn(5, 1, 2, 7, 4)[:4], randn(2, 1, 4)), ValueError, "7, 1 .*7, 7"),
    "heads": (lambda: attend(Q[:, :3], Q, Q), ValueError, "3 heads and 7 .* 4 heads and 7"),
    "more queries": (lambda: attend(Q, Q[:, :, 2:], Q), ValueError, "7 positions .* 4 heads and 5"),
    "mask of integers": (lambda: attend(Q, Q, Q, mask=torch.ones(7, 7).long()), ValueError, "bool.*int64"),
    "vit: image": (lambda: vit()(torch.zeros(1, 2, 8, 9)), ValueError, r"\(8, 9\).*patch_size=2"),
    "vit: image_size": (lambda: vit(image_size=9), ValueError, "image_size=9 .*patch_size=2"),
}


@pytest.mark.parametrize("call, error, match", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- The scripts

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --pe-embd 8 --batch-size 4 --steps 10 --pretrain-steps 5"
SIZE = {train_lm: "--block-size 8", train_vit: "--image-size 8 --patch-size 2"}
TASK = {train_lm: train_lm.Text, train_vit: train_vit.Images}


@pytest.fixture(params=[train_lm, train_vit], ids=["lm", "vit"])
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(train_lm.Text, "n_evaluated", 16)
    text = "".join(random.Random(0).choices("abcdefé\n", k=3000))
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    return tmp_path / "own.txt"


@pytest.fixture
def data(script, corpus, tmp_path):
    return corpus if script is train_lm else write_npz(tmp_path / "own.npz")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """In place of the standard library: 30 short files, one in Latin-1 and a link to nowhere."""
    folder, rng = tmp_path_factory.mktemp("library"), random.Random(0)
    for i in range(30):
        text = rng.choices("abcdefghijklmnopqrstuvwxyz0123456789@=\n", k=2000)
        (folder / f"m{i}.py").write_text("".join(text))
    (folder / "latin.py").write_bytes("# é".encode("latin-1"))
    (folder / "link.py").symlink_to(folder / "nowhere")
    return folder


def write_npz(path, **arrays):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5), dtype=np.uint8)
    arrays = {"images": images, "labels": np.arange(40) % 3, **arrays}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def command(script, data, out, more=""):
    """The arguments of a run of a fifth of a second; the last one of a kind counts."""
    return [*TINY.split(), *SIZE[script].split(), "--data", str(data), "--out", str(out), *more.split()]


def run(script, *arguments):
    return script.main(command(script, *arguments))


def parsed(script, line):
    with patch.object(script, "run_all", lambda Task, args: (args, Task)):
        return script.main(line.split())


def task_of(script, data, more=""):
    args, Task = parsed(script, " ".join(command(script, data, "out", more)))
    return Task(args)


def outcome(capsys, script, *arguments):
    """None where a run ends well, else what it says: one line, after which the exit code is 2 or 130."""
    _, code = capsys.readouterr(), 0
    try:
        train_lm.run_script(lambda: script.main(command(script, *arguments)))
    except SystemExit as exit_:
        code = exit_.code
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    lines = [line for line in lines if line and not re.search(r"\d+/\d+ \[", line)]     # progress bars
    assert len(lines) == (code > 0) and code in (0, 2, 130), (arguments, code, lines)
    return lines[0] if lines else None


def on_step(monkeypatch, n, action):
    """Raise an error in the n-th step, or return another loss; the mock that is returned counts the steps."""
    def training_loss(*given):
        loss, regularizers = original(*given)
        return Mock(side_effect=action)(loss) if steps.call_count == n else loss, regularizers

    original, steps = train_lm.training_loss, Mock(side_effect=training_loss)
    monkeypatch.setattr(train_lm, "training_loss", steps)
    return steps


def files(folder, end=""):
    return {path: path.read_bytes() for path in sorted(folder.glob("*" + end))}


def test_all_encodings_are_trained_and_recorded(script, data, tmp_path, monkeypatch, capsys):
    """Table and JSON say the same; a seed gives all encodings the same batches; it alone gives the same."""
    batches, batch = [], TASK[script].batch
    monkeypatch.setattr(TASK[script], "batch", lambda *given: batches.append(batch(*given)) or batches[-1])
    results = run(script, data, tmp_path / "out", "--pe all --seed 0,1 --steps 8")
    printed, form, encodings = capsys.readouterr().out, TASK[script].form, TASK[script].encodings
    sums = [sum(part.double().sum().item() for part in ([each] if script is train_lm else each))
            for each in batches]
    assert sums == sums[:8] * 6 + sums[-8:] * 6 and sums[:8] != sums[-8:]
    for (title, rows), record in zip(results.items(), files(tmp_path / "out", ".json").values(), strict=True):
        columns = [8, 16, 32, 64, 128] if script is train_lm else [8, 12, 16, 20, 24]
        assert json.loads(record) == {"columns": columns, title: rows} and [*rows] == encodings
        head, _, *lines = printed[printed.rindex(title):].split("\n\n")[1].splitlines()
        table = {pe: [f"{statistics.mean(x):{form}}±{statistics.stdev(x):{form}}" for x in zip(*seeds)]
                 for pe, seeds in rows.items()} | {"encoding": [*map(str, columns)]}
        assert {pe: cells for pe, *cells in (re.split(r" *\| *", line) for line in (head, *lines))} == table
    for title, rows in run(script, data, tmp_path / "1", "--pe rope,seqpe --seed 1 --steps 8").items():
        assert {pe: row for pe, [row] in rows.items()} == {pe: results[title][pe][1] for pe in rows}
    run(script, data, tmp_path / "2", "--pe rope --seed 0,1 --lr 0")
    first, second = (torch.load(path)["model"] for path in files(tmp_path / "2", ".pt"))
    assert not any(first[name].equal(second[name]) for name in first if name.endswith("mlp.0.weight"))


def test_a_chart_shows_the_table(tmp_path):
    """Lines, bars, SeqPE in red; six names are in the picture, 13 apart, where all lines end at one place."""
    def chart(rows):
        train_lm.report("Right in %, by px", ".1f", (1, 2, 3), rows, tmp_path / "x")
        svg = ElementTree.parse(tmp_path / "x.svg").getroot()
        return {g[-1].text: g for g in svg.iter() if g.tag.endswith("}g")}

    lines = chart({"nope": [[9, 50, 0]], "seqpe": [[90, 100, 70], [70, 100, 90]]})
    shape = lines["seqpe"][0].get("d")         # 80 +- 14.14
    assert shape.startswith("M36,72.0L126,40.0L216,72.0M") and "49.4V94.6" in shape
    assert {pe: g.get("class") for pe, g in lines.items()} == {"seqpe": "us", "none": ""}
    for last in (0, 100):
        lines = chart({pe: [[50, 50, last]] for pe in train_lm.Text.encodings})
        places = sorted(float(g[-1].get("y")) for g in lines.values())
        assert len(places) == 6 and all(b - a >= 13 for a, b in itertools.pairwise(places))
        assert 12 < places[0] and places[-1] < 218      # above the numbers of the axis


def test_scores_are_of_the_split_that_is_asked_for(script, data, tmp_path, monkeypatch):
    """But those shown in training, for choosing settings, are of the validation's. A file has one of them."""
    scored, score, sizes = [], TASK[script].score, task_of(script, data).sizes * len(TASK[script].tables)
    monkeypatch.setattr(TASK[script], "score", lambda task, model, split, T, **how: scored.append(
        (split, T)) or score(task, model, split, T, **how))
    for split in ("test", "val"):
        run(script, data, tmp_path / "out", f"--pe rope --split {split} --resume")
    assert scored == [("val", sizes[0]), *(("test", T) for T in sizes), *(("val", T) for T in sizes)]
    assert len(files(tmp_path / "out", ".json")) == 2 * len(TASK[script].tables)


def test_training_is_that_of_a_plain_loop(corpus, tmp_path):
    """40 steps in float64: AdamW with decay of matrices alone, warm-up and cosine, clipping, both losses."""
    task = task_of(train_lm, corpus, "--steps 40 --lr 0.01 --contrast-weight 0.5 --distill-weight 1")
    torch.set_default_dtype(torch.float64)
    try:
        found = train_lm.train(task, "seqpe", 3, tmp_path / "x.pt").state_dict()
        torch.manual_seed(3)
        model, data, clipped, moments = task.model("seqpe"), seeded(3), Counter(), {}
        model.pe.pretrain(5)
        for step in range(40):
            batch, (windows, which) = task.batch(data), seqpe.training_windows((8,), 4, 128)
            signals = model.pe(windows, which, count=True)
            regularizers = model.pe.loss(contrast_weight=0.5, distill_weight=1.0)
            (model(batch[:, :-1], batch[:, 1:], signals)[1] + regularizers).backward()
            rate = 0.01 * min(1, (step + 1) / 2) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 40)) / 2)
            for is_pe in (True, False):
                part = {n: p for n, p in model.named_parameters() if n.startswith("pe.") == is_pe}
                norm = math.sqrt(sum(p.grad.square().sum().item() for p in part.values()))
                clipped[is_pe] += norm > 1
                for n, p in part.items():
                    g, (m, v) = p.grad / max(norm + 1e-6, 1), moments.get(n, (0, 0))
                    m, v = moments[n] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g ** 2
                    m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
                    p.data -= rate * (0.1 * p.data * (p.dim() > 1) + m / (v.sqrt() + 1e-8))
            model.zero_grad()
    finally:
        torch.set_default_dtype(torch.float32)
    assert min(clipped.values()) > 0, clipped
    for name, weights in model.state_dict().items():
        assert_close(found[name], weights, rtol=1e-7, atol=1e-8)


def test_speed_is_measured_from_once_to_64_times_the_training_length(corpus, tmp_path, capsys):
    corpus.write_text("abcdefgh" * 700)
    run(train_lm, corpus, tmp_path, "--pe seqpe,rope --bench --reach 64")
    row = r"(step|read \d+) +seqpe +[\d.]+ ms \([\d.]+x\) +rope +[\d.]+ ms \(1.00x\)"
    assert [re.fullmatch(row, each)[1] for each in capsys.readouterr().out.splitlines()] == [
        "step", "read 8", "read 32", "read 128", "read 512"]


def test_evaluation_scores_the_same_characters_at_every_length(corpus):
    task, text = task_of(train_lm, corpus, "--reach 4"), corpus.read_text(encoding="utf-8")[2700:]
    model, excerpts = task.model("rope"), {T: task.excerpts("test", T) for T in task.sizes}
    assert [*excerpts] == [8, 16, 32] and all(each[:, -9:].equal(excerpts[8]) for each in excerpts.values())
    for T in excerpts:
        losses = []
        for each in excerpts[T]:
            string = "".join(task.characters[i] for i in each)
            assert string in text and len(string) == T + 1
            log_p = model(each[:-1].unsqueeze(0))[0][0].log_softmax(-1)
            losses += [-log_p[i, each[i + 1]].item() for i in range(T - 8, T)]
        assert task.score(model, "test", T) == pytest.approx(statistics.mean(losses), rel=1e-4)


def test_python_data_is_split_by_whole_files_that_can_be_read(library, monkeypatch):
    assert min(map(len, train_lm.read_text("python").values())) > 100_000
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    texts = dict.fromkeys(("train", "val", "test"), "")
    for name in sorted(f"m{i}.py" for i in range(30)):
        split = {0: "val", 1: "test"}.get(zlib.crc32(name.encode()) % 10, "train")
        texts[split] += (library / name).read_text()
    assert train_lm.read_text("python") == train_lm.read_text("recall") == texts and all(texts.values())


def test_arguments_come_before_recipes_and_those_before_defaults(script):
    ours = {name: row[0] for name, row in train_lm.OPTIONS.items()}
    more = {"--data recall": dict(steps=1200, lr=1e-3)}
    paper = dict(windows="whole", shift_prob=0.1, shift_steps=1, paper_groups=1, pe_dropout=0.1,
                 pretrain_steps=0, head_norm=0.0, diagonal_maps=0, pe_embd=128)
    if script is train_vit:
        ours |= dict(steps=4000, lr=1e-3, n_embd=96, windows="torn", pieces=8, shift_prob=0.25, pe_embd=32)
        more, paper = {"--data x": {}}, paper | dict(fusion="mul", pe_embd=96)
    for line, said in {"": {}, "--recipe paper": paper, **more}.items():
        args = parsed(script, line)[0]
        assert (ours | said).items() <= args.settings.items() <= vars(args).items()
        for name, value in {"steps": 7, "head_norm": 2.5, "pe_dropout": 0.25, "windows": "plain"}.items():
            found = parsed(script, f"{line} --{name.replace('_', '-')} {value}")[0].settings
            assert found == args.settings | {name: value}


@pytest.mark.parametrize("pe, length", [("rope", 16), ("learned", 8)])
def test_the_sample_goes_on_from_other_text(corpus, tmp_path, capsys, pe, length):
    """To twice the training length, or to what the learned table holds."""
    shown, task = [], task_of(train_lm, corpus, "--windows plain")
    model, start = drawn(0, task.model, pe), corpus.read_text(encoding="utf-8")[2400:][:1 + length // 8]
    for seed in (0, 0, 1):
        drawn(seed, task.show, model)
        shown.append(capsys.readouterr().out[1:-1])
        assert len(shown[-1]) == length and shown[-1].startswith(start)
    assert shown[0] == shown[1] != shown[2]
    for console in (io.TextIOWrapper(io.BytesIO(), "ascii"), None, io.StringIO()):      # the first has no é
        with patch.object(sys, "stdout", console):
            assert outcome(capsys, train_lm, corpus, tmp_path / "out", "--resume") is None


def test_files_are_named_after_what_makes_a_run_what_it_is(script, data, tmp_path, monkeypatch):
    """No two commands with different results share a file; others do."""
    settings, fresh = parsed(script, "")[0].settings, {"windows": "plain", "fusion": "mul", "reach": 32}
    lines = {f"--{name.replace('_', '-')} {fresh.get(name, 1 - value if value in (0, 1) else 1)}"
             for name, value in settings.items()} | {"", "--recipe paper"}
    assert len({parsed(script, line)[0].name for line in lines}) == len(lines) == len(settings) + 2
    assert not parsed(script, "--out x --split val --device cpu --pe rope --resume")[0].name
    args = parsed(script, "--lr 0.002 --steps 3 --recipe paper --fusion mul")[0]
    assert args.name == "-recipe=paper-steps=3-lr=0.002-fusion=mul"
    monkeypatch.setenv("HOME", str(tmp_path))
    run(script, "~/" + data.name, "~/out", "--pe rope,nope --seed 2,1 --steps 1")
    assert len(files(tmp_path / "out", ".pt")) == 4


def test_resume_gives_the_weights_of_an_uninterrupted_run(script, data, tmp_path, monkeypatch, capsys):
    """Bit for bit, with dropout, from the last of every hundred steps."""
    out, stop, more = tmp_path / "out", KeyboardInterrupt, "--steps 104 --pe-dropout 0.1 --resume"
    run(script, data, tmp_path / "whole", more)
    for n, error, said, steps in ((2, stop, "stopped: ", []), (102, stop, "stopped: ", [100]),
                                  (3, RuntimeError("out of memory\nat 0x7f"), "error: out of memory", [100]),
                                  (3, lambda loss: loss * math.nan, "step 104: weights that are not", [100]),
                                  (0, None, "None", [104])):
        with monkeypatch.context() as patch:
            on_step(patch, n, error)
            assert said in str(outcome(capsys, script, data, out, more))
        assert [torch.load(path)["step"] for path in files(out, ".pt")] == steps
    (whole,), (resumed,) = (map(torch.load, files(folder, ".pt")) for folder in (tmp_path / "whole", out))
    assert all(map(torch.equal, whole["random"], resumed["random"]))
    assert all(torch.equal(weights, resumed["model"][name]) for name, weights in whole["model"].items())


def test_an_interrupted_run_shows_and_keeps_what_is_finished(script, data, tmp_path, monkeypatch, capsys):
    """In table, record and chart. --resume goes on, and until then no earlier table is lost."""
    out, titles = tmp_path / "out", TASK[script].tables
    arguments = script, data, out, "--pe rope,nope,seqpe --resume"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_step(patch, 13, KeyboardInterrupt)
        run(*arguments)
    assert re.findall(r"^(rope|nope) +\|", capsys.readouterr().out, re.M) == ["rope"] * len(titles)
    for title, record in zip(titles, files(out, ".json").values(), strict=True):
        assert [*json.loads(record)[title]] == ["rope"]
    assert len(files(out, ".svg")) == len(titles) and len(files(out, ".pt")) == 1
    steps, results, printed = on_step(monkeypatch, 0, None), run(*arguments), capsys.readouterr().out
    assert re.findall(r"-(rope|nope|seqpe)-.*: finished$", printed, re.M) == ["rope"]
    assert steps.call_count == 20 and all([*rows] == ["rope", "nope", "seqpe"] for rows in results.values())
    before, _ = files(out), monkeypatch.setattr(train_lm, "train", Mock(side_effect=KeyboardInterrupt))
    assert outcome(capsys, *arguments).startswith("stopped") and files(out) == before


def test_ctrl_c_stops_a_process_in_the_middle_of_its_steps(corpus, tmp_path):
    arguments = command(train_lm, corpus, tmp_path, "--pe rope --steps 5000")
    process = subprocess.Popen([sys.executable, train_lm.__file__, *arguments], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not files(tmp_path, ".pt") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == "stopped: --resume goes on from the last of every 100 steps"
    assert torch.load(*files(tmp_path, ".pt"))["step"] >= 100


def test_a_finished_run_is_shown_again_and_not_overwritten(script, data, tmp_path, monkeypatch, capsys):
    """The very same numbers and sample, which are without dropout; not where --resume is left out, nor if it
    cannot go on: from what is cut off, not ours, of another setting, or of the data in another order.
    """
    arguments = script, data, tmp_path, "--recipe paper --pe-dropout 0.5 --shift-prob 1"
    resumed = *arguments[:-1], f"{arguments[-1]} --resume"
    results, printed = run(*arguments), capsys.readouterr().out
    steps, ((path, whole),) = on_step(monkeypatch, 0, None), files(tmp_path, ".pt").items()
    good, cannot = torch.load(path), f"{path}: cannot go on from it, use another --out: "
    said = f"{path} exists: --resume goes on or shows it again, another --out starts anew"
    assert outcome(capsys, *arguments) == f"script.py: error: {said}"
    torch.save(good | {"random": [*good["random"], *[torch.zeros(16, dtype=torch.uint8)] * 2]}, path)
    with patch.object(torch.cuda, "set_rng_state_all") as states:   # written beside two GPUs
        assert run(*resumed) == results and states.call_args.args == ([],)
    assert capsys.readouterr().out == f"{path}: finished\n{printed}" and all(map(printed.count, results))
    with patch.object(torch, "set_rng_state", lambda _: torch.manual_seed(1)):
        assert run(*resumed) == results         # dropout would make them others
    for content in (whole[:len(whole) // 2], b"not a checkpoint"):
        path.write_bytes(content)
        assert cannot in outcome(capsys, *resumed) and path.read_bytes() == content
    torch.save(good | {"settings": good["settings"] | {"lr": 8.0}}, path)
    assert outcome(capsys, *resumed).endswith(f"{cannot}it has another lr")
    if script is train_vit:
        write_npz(data, **{name: array[::-1] for name, array in np.load(data).items()})
    else:
        data.write_text(data.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    path.write_bytes(whole)
    assert outcome(capsys, *resumed).endswith(f"{cannot}it has another checksum of the data")
    assert not steps.called


def test_what_cannot_be_written_is_one_line(script, data, tmp_path, monkeypatch, capsys):
    """Before the first step, if it can be. What was there stays, and nothing half-written is left."""
    steps, out, more = on_step(monkeypatch, 0, None), tmp_path / "out", "--pe rope --resume --steps 101"
    full, write = OSError(errno.ENOSPC, "No space left on device"), Path.write_bytes
    for wrong in (data, data / "out"):
        assert str(data) in outcome(capsys, script, data, wrong, more)
    assert "too long" in outcome(capsys, script, data, out, f"--seed {','.join(map(str, range(99)))}")
    assert not steps.called and not files(out)

    def half(path, content):        # of the second checkpoint, at step 101
        whole = ".pt" not in path.name or steps.call_count < 101
        write(path, content if whole else bytes(content)[:100])
        return whole or Mock(side_effect=full)()

    with patch.object(Path, "write_bytes", half):
        said = outcome(capsys, script, data, out, more)
    (path,) = files(out, ".pt")
    assert said == f"script.py: error: cannot write {path}: No space left on device"
    assert torch.load(path)["step"] == 100 and not files(out, ".tmp")


def test_data_that_cannot_be_used_is_one_line(corpus, tmp_path, capsys):
    npz, grey, n = tmp_path / "own.npz", np.zeros((40, 6, 5), np.uint8), np.arange(40)
    whole, script = write_npz(npz).read_bytes(), {corpus: train_lm, npz: train_vit}
    wrong = [dict(images=grey / 2), dict(images=grey[0]), dict(images=grey[:, :0])]
    wrong += [dict(images=grey[:5], labels=n[:5]), dict(labels=n[1:]), dict(labels=n / 2)]
    for path, said, table in (
            (corpus, "too short", [b"", b"ab" * 10]), (corpus, "text file in UTF-8: ", [b"\xff"]),
            (npz, "nor an .npz", [b"no zip", whole[:999], dict(labels=None), dict(labels=n.astype("O"))]),
            (npz, "needs uint8 images", wrong), (npz, "are -1 to 38", [dict(labels=n - 1)]),
            (npz, "are 9000 to 9039, but must be from 0 to below 40", [dict(labels=n + 9000)]),
            (npz, "label 1 is of too few images", [dict(labels=np.repeat([0, 1, 2], [36, 1, 3]))])):
        for content in table:
            path.write_bytes(content) if isinstance(content, bytes) else write_npz(path, **content)
            line = outcome(capsys, script[path], path, tmp_path / "out")
            assert line and f"--data {path}: " in line and said in line, (content, line)
        assert f"--data {tmp_path}: " in outcome(capsys, script[path], tmp_path, tmp_path / "out")
    for path, reads in ((corpus, (Path, "read_text")), (npz, (np, "load"))):
        with patch.object(*reads, side_effect=PermissionError(errno.EACCES, "Permission denied")):
            assert "Permission denied" in outcome(capsys, script[path], path, tmp_path / "out")
    corpus.write_bytes(b"\xef\xbb\xbf" + b"abc\r\n" * 1000)     # a byte order mark is no character
    assert task_of(train_lm, corpus).characters == ["\n", *"abc"]


def test_arguments_that_cannot_be_used_are_one_line(script, data, tmp_path, capsys):
    table = {
        "--pe rotary": "unknown --pe 'rotary'; known: seqpe, rope,", "--pe all,rope": "unknown --pe 'all'",
        "--fusion sum": "choice: 'sum'", "--lr x": "float value: 'x'", "--lr nan": "--lr must be from 0",
        "--shift-prob 2": "--shift-prob must be from 0 to 1", "--load x": "unrecognized arguments: --load",
        "--seed 4294967296": "--seed must be integers", "--seed 0,": "'0,'", "--steps 0": "must be from 1 to",
        "--pieces 10": "choice: 10", "--shift-steps 2": "choice: 2",
        "--pe nope,rope --n-embd 6": "rope needs ", "--n-embd 10000000": "memory"}
    table |= {"--reach 5": "--reach a power of two",
              "--data recall --block-size 41": "--block-size must be 42"} if script is train_lm else {
              "--image-size 2": "twice --patch-size", "--windows counted": "choice: 'counted'"}
    for line, said in table.items():
        found = outcome(capsys, script, data, tmp_path / "out", line)
        assert found is not None and said in found, (line, found)
    assert not files(tmp_path / "out", ".pt") and not files(tmp_path / "out", ".svg")


RECORD = re.compile("@([a-z]{2})=([0-9]{3})")


@pytest.fixture(scope="module")
def recall(library):
    """The task on windows of 64 characters, of which 42 are records and questions."""
    with patch.object(sysconfig, "get_path", lambda _: str(library)):
        return task_of(train_lm, "recall", "--block-size 64 --batch-size 16")


def strings(task, text):
    return ["".join(task.characters[i] for i in row) for row in text]


def test_recalls_batches_loss_and_score(recall, monkeypatch):
    """Records, which may repeat, and again at the end in another order. The loss is the answers' and the
    text's; right is what has the likeliest digits.
    """
    state, batch = torch.get_rng_state(), recall.batch(seeded(1))
    assert torch.equal(torch.get_rng_state(), state) and batch.shape == (16, 65)
    records = [RECORD.findall(text) for text in strings(recall, batch)]
    assert {(len(r), len(set(r))) for r in records} == {(6, 1), (6, 2), (6, 3)}
    assert all(sorted(r[:3]) == sorted(r[3:]) for r in records) and any(r[:3] != r[3:] for r in records)
    model = recall.model("seqpe").double()
    log_p = model(batch[:, :-1])[0].log_softmax(-1)
    nats = -log_p.gather(-1, batch[:, 1:, None]).squeeze(-1)
    answers = [64 - 21 + 7 * question + 4 + digit for question in range(3) for digit in range(3)]
    assert_close(recall.loss(model, batch, None, None)[1], nats[:, answers].mean() + nats.mean())
    wrong, asked = (torch.rand(256, 64, generator=seeded()) < 0.2).long(), []
    monkeypatch.setattr(recall, "predict", lambda model, text: asked.append(text) or F.one_hot(
        (text[:, -64:] + wrong) % len(recall.characters)))
    right = (wrong[:, answers].view(-1, 3, 3) == 0).all(-1).double().mean().item()
    for T in (64, 256):
        assert recall.score(model, "val", T) == pytest.approx(100 * right) and asked[-1].shape == (256, T + 1)
        found = [[*RECORD.finditer(text)] for text in strings(recall, asked[-1])]
        assert {len(each) for each in found} == {6} and {each[3].start() for each in found} == {T + 1 - 21}
        assert len({each[0].start() for each in found}) > (T - 42) / 4      # anywhere before


@pytest.mark.parametrize("shift_steps", [0, 1])
@pytest.mark.parametrize("windows", ["counted", "torn", "whole", "plain"])
def test_what_a_step_gives_the_model(script, data, monkeypatch, windows, shift_steps):
    """Three of eight windows are moved, or all by chance and then without L_OOD; for nope none is."""
    losses, windows = [], "torn" if script is train_vit and windows == "counted" else windows
    task = task_of(script, data, f"--windows {windows} --shift-steps {shift_steps} --shift-prob 0.4 "
                   "--pieces 3 --batch-size 20 --contrast-weight 0.3 --distill-weight 0.5 --paper-groups 1")
    monkeypatch.setattr(seqpe.SequentialPE, "loss",
                        lambda *said, **named: losses.append((*said, named)) or 0.25)
    for pe in ("seqpe", "rope", "nope"):
        model, n_offsets, n_plain, met = drawn(0, task.model, pe), set(), 0, []
        model.pe.register_forward_pre_hook(lambda _, given: met.append(given))
        for i in range(40):
            batch = task.batch(seeded(i))
            loss, regularizers = train_lm.training_loss(task, model, batch)
            (positions, *more), n_moved = met.pop(), 0
            place = seqpe.window(model.shape)[slice(None) if script is train_lm else batch[2]]
            assert loss.isfinite() and (positions[-1] if more else positions).equal(place)      # 0 to T - 1
            if more:
                (which, *count), n_moved = more, 8 if shift_steps else 3
                assert count == ([windows == "counted"] if script is train_lm else [])
                assert which.tolist() == (which[:8].tolist() * 3)[:20]
                assert sorted(which[:8]) == [min(i, len(positions) - 1) for i in range(8)]
                assert len(positions) == n_moved + 1
                offset = (positions - place)[:-1].movedim(-1, 1).flatten(0, 1)
                assert offset.min() >= 0 and positions.max() < model.pe.max_position
                n_offsets |= {len(each.unique()) for each in offset}
            said = model.pe, 0.3, 0.0 if shift_steps and n_moved else 0.5, dict(paper=1)
            assert (regularizers, losses) == ((0.25, [said]) if pe == "seqpe" else (0.0, [])), n_moved
            n_plain += not losses.clear() and not more
        assert n_plain == 40 if windows == "plain" or pe == "nope" else (10 < n_plain < 36) == shift_steps
        assert n_offsets == (set() if n_plain == 40 else {1} if windows == "whole" else {1, 2, 3})


def test_a_table_has_rows_for_what_training_meets(script, data):
    """Of the training window alone where none is moved; then a longer one is interpolated."""
    small, large = (8, 128) if script is train_lm else (4, 12)
    for windows, side in (("whole", large), ("plain", small)):
        task = task_of(script, data, f"--windows {windows}")
        model = task.model("learned")
        assert model.pe.table.shape == (*[side] * len(model.shape), 16)
        with patch.object(model.pe, "interpolate", Mock(side_effect=model.pe.interpolate)) as stretched:
            assert all(math.isfinite(task.score(model, "val", size)) for size in task.sizes)
        assert stretched.call_count == (4 if windows == "plain" else 0)


def test_each_digit_is_in_one_split():
    images, labels = train_vit.read_images("digits", 32)
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 240
    every, *splits = [torch.cat([images.flatten(1), labels[:, None]], dim=1).tolist() for images, labels in (
        (images, labels), *task_of(train_vit, "digits").splits.values())]
    assert [len(split) for split in splits] == [1199, 200, 398] and sorted(sum(splits, [])) == sorted(every)
    assert all({row[-1] for row in split} == {*range(10)} for split in splits)


def test_images_of_ones_own(tmp_path):
    """Grey or in colour, labelled in any kind of integers, in their order or in turn; no pixels are lost."""
    path, labels = tmp_path / "own.npz", np.arange(40) % 3
    for shape, dtype in ((6, 5), ">i4"), ((9, 4, 3), "u2"), ((8, 8, 1), "u8"), ((3, 3), "i1"):
        images = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
        write_npz(path, images=images, labels=labels.astype(dtype))
        found, of = train_vit.read_images(path, 16)
        found = found.movedim(1, -1).flatten(1).tolist()
        assert sorted(zip(found, of.tolist())) == sorted(zip(images.reshape(40, -1).tolist(), labels))
        assert run(train_vit, path, tmp_path / f"{dtype}", "--steps 3 --pe rope")
    for labels in (np.arange(99) % 9, np.arange(99) // 11):
        write_npz(path, images=np.zeros((99, 4, 4), np.uint8), labels=labels)
        assert [{*of.tolist()} for _, of in task_of(train_vit, path).splits.values()] == [{*range(9)}] * 3
    stripes = np.tile(np.array([0, 255, 0, 0], np.uint8), (9, 36, 9))
    found = train_vit.read_images(write_npz(path, images=stripes, labels=np.arange(9) % 3), 9)[0]
    assert found.shape == (9, 1, 9, 9) and (found[..., 1:-1].float() - 255 / 4).abs().max() < 8


def test_accuracy_counts_what_is_right_at_every_size_and_steps_look_at_a_share():
    """A model that knows three of four labels."""
    task, shown = task_of(train_vit, "digits"), []
    images, labels = task.splits["test"] = [each[:100] for each in task.splits["test"]]         # one batch

    def model(some, signals):
        assert some.equal(train_vit.draw(images, some.size(-1)))
        shown.append(signals)
        return torch.eye(10)[(labels + (torch.arange(100) % 4 == 0)) % 10], None

    model.shape, model.pe = (4, 4), SimpleNamespace(interpolate=lambda grid: grid, max_position=12)
    for title, how in task.tables.items():
        assert [task.score(model, "test", size, **how) for size in (8, 12, 16, 20, 24)] == [75.0] * 5
        assert shown[-5:] == [None, *((n, n) if "interpolated" in title else None for n in (6, 8, 10, 12))]
    kept = [task.batch(seeded(i))[2] for i in range(200)]
    assert {len(k.unique()) for k in kept} == {len(k) for k in kept} == set(range(4, 17))       # of 16
    assert torch.cat(kept).bincount().min() > 100               # any of them


# ---- README.md and data/RESULTS.md

HERE = Path(seqpe.__file__).parent
README, RESULTS = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "data/RESULTS.md"))
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readmes_options_and_tables(capsys):
    """It names only options that exist; ours, the paper's and lines of files are right."""
    for module in (train_lm, train_vit):
        with pytest.raises(SystemExit):
            module.main(["--help"])
    known, named = (set(re.findall(r"--[a-z][a-z-]+", text))
                    for text in (capsys.readouterr().out, README + RESULTS))
    assert "--pe" in named and named <= known | {"--index-url"}, named - known
    rows = re.findall(r"^`--([a-z-]+)` \| ([\w.]+) \| ([\w.]+) \|", README, re.M)
    differ = {name.replace("_", "-"): row[:2] for name, row in train_lm.OPTIONS.items() if row[0] != row[1]}
    kinds = {name: type(ours) for name, (ours, _) in differ.items()}
    assert {name: (kinds[name](ours), kinds[name](paper)) for name, ours, paper in rows} == differ
    rows = re.findall(r"^\[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", README, re.M)
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in HERE.glob("*.py")}
    assert len(rows) > 2 and {name: int(lines) for name, lines in rows}.items() <= sizes.items()


def test_the_commands_run_one_after_another_in_one_folder(tmp_path, library, monkeypatch):
    """In their small form: the same options, then those of a tiny model. None meets another's files."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library)), monkeypatch.chdir(tmp_path)
    for place, name, value in ((train_lm.Text, "n_evaluated", 2), (train_lm.Recall, "n_evaluated", 2),
                               (train_vit, "MAGNIFICATIONS", (1, 1.5))):
        monkeypatch.setattr(place, name, value)
    pieces = re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", README + RESULTS, re.S | re.M)
    commands = re.findall(r"python (train_\w+)\.py\b([^`\n;&]*)", "\n".join(map("".join, pieces)))
    for name, arguments in dict.fromkeys(each for each in commands if "FILE" not in each[1]):
        arguments = shlex.split(arguments.replace("0,1,2", "0"))
        small = [*TINY.split()[:-4], "--steps", "3" if "--steps" in arguments else "2"]
        small += ["--pretrain-steps", "3" if "--pretrain-steps" in arguments else "2"]
        small += ["--block-size", "42" if "recall" in arguments else "8"] if name == "train_lm" else []
        {"train_lm": train_lm, "train_vit": train_vit}[name].main([*arguments, *small])
    assert len(set(commands)) > 5 and len(files(tmp_path / "out", ".svg")) > 5


def test_the_readmes_example_holds_its_loss_beyond_the_training_length(T=32):
    """Trained for seconds in a GPT that has no encoding; on the same last characters of T to 8T."""
    splits = train_lm.read_text("python")
    index = {c: i for i, c in enumerate(sorted(set("".join(splits.values()))))}
    train, val = (torch.tensor([index[c] for c in splits[name][:10 ** 6]]) for name in ("train", "val"))
    model = drawn(0, GPT, len(index), T, n_layer=2, n_head=2, n_embd=64, pe="nope")
    example = EXAMPLE.replace("4, 32, 16, 64, 512", "2, 32, 16, 32, 320").replace("train()", "train(150)")
    exec(example, found := {})
    assert found["loss"].isfinite()
    model.example, losses = found["pe"], []
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 - 0.9 * step / 250)
        batch = train[torch.randint(len(train) - T, (16, 1)) + torch.arange(T + 1)]
        signals = [Signal(extend=torch.stack(model.example.for_training(16), dim=-4))]
        (model(batch[:, :-1], batch[:, 1:], signals)[1] + model.example.loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for n in (T, 2 * T, 4 * T, 8 * T):
        chars = val[torch.linspace(8 * T + 1, len(val), 128).long().unsqueeze(1) + torch.arange(-n - 1, 0)]
        with torch.no_grad():
            signals = [Signal(extend=torch.stack(model.example.for_reading(n), dim=-4))]
            logits = model(chars[:, :-1], signals=signals)[0][:, -T:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), chars[:, -T:].flatten()).item())
    assert losses[0] < 2.4 and losses[-1] < losses[0] + 0.05 and max(losses) < losses[0] + 0.1, losses

"""The tests: the arithmetic of seqpe.py against slow loops in float64, what is promised of it, and the path
of tensors between host and GPU, for which no GPU is needed; then the scripts as a user runs them, interrupts
them and mistypes them; then what the README says.
"""

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
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seqpe
import train_lm
import train_vit
from seqpe import (GPT, GPTConfig, SeqPE, Signal, attend, contrastive_loss, count_bias, digits_to_position,
                   distillation_loss, place_windows, position_regularizers, position_to_digits,
                   pretrain_encoder, sample_groups, sample_hard_negatives, window)
from train_vit import ViT, ViTConfig

torch.set_num_threads(1)        # two that wait for each other on a busy machine are many times slower
BOTH = ["seqpe-scalar", "seqpe-mul", "seqpe-add", "seqpe-input", "rope", "sinusoidal", "learned", "nope"]
TEXT, IMAGE = [*BOTH, "alibi"], [*BOTH, "rope_mixed"]


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


# ---- Digits, and the encoder that reads them


def slow_digits(number, n_digits, base):
    digits = []
    for _ in range(n_digits):
        number, digit = divmod(number, base)
        digits.insert(0, digit)
    return digits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("base", [2, 7, 10, 36])
def test_digits_equal_pythons_arithmetic(base, dtype):
    assert position_to_digits(torch.tensor([2, 13]), n_digits=2).tolist() == [0, 2, 1, 3]   # as in the paper
    draw, most = random.Random(base), max(n for n in range(1, 64) if base ** n <= 2 ** 63)
    for shape, n_digits in itertools.product([(1,), (3, 2), (2, 0, 1), (2, 1, 2, 3)], (1, 4, most)):
        limit = min(base ** n_digits, torch.iinfo(dtype).max + 1)
        numbers = [draw.choice([0, limit - 1, draw.randrange(limit) >> draw.randrange(63)])  # of every length
                   for _ in range(math.prod(shape))]
        digits = position_to_digits(torch.tensor(numbers, dtype=dtype).view(shape), n_digits, base)
        assert digits.shape == (*shape[:-1], shape[-1] * n_digits) and not digits.is_floating_point()
        assert digits.flatten().tolist() == sum((slow_digits(n, n_digits, base) for n in numbers), [])
        back = digits_to_position(digits, n_digits, base)
        assert back.shape == shape and back.flatten().tolist() == numbers


def slow_linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def slow_layer_norm(x, weights, name):
    scale = weights[name + ".weight"] / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True)) * scale + weights[name + ".bias"]


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
                row = weights["symbol.weight"][digit]
                row = row + weights["place.weight"][dimension * encoder.n_digits + place]
                rows.append(row + weights["dimension.weight"][dimension] if len(position) > 1 else row)
        x = torch.stack([*rows, weights["cls"]])
        for layer in range(len(encoder.blocks)):
            x = slow_block(x, weights, f"blocks.{layer}", causal=True, approximate="tanh")
        e = slow_linear(slow_layer_norm(x, weights, "ln")[-1], weights, "proj")
        if encoder.head_norm is not None:
            e = torch.cat([encoder.head_norm * h / (h ** 2).sum().sqrt() for h in e.chunk(encoder.n_head)])
        embeddings.append(e)
    return torch.stack(embeddings)


@pytest.mark.parametrize("n_dim, settings", [
    (1, dict(max_position=20_000, base=10)), (1, dict(n_layer=1, head_norm=3.0)),
    (1, dict(n_layer=3, base=2, width=8)), (2, dict(base=3)), (2, dict(width=24, head_norm=0.5)), (3, {}),
])
def test_encoder_is_the_papers_transformer(n_dim, settings):
    """A row for every place; and nothing scales what comes out, unless by head_norm, a head's length."""
    encoder = make_encoder(n_dim, **settings)
    positions = torch.randint(encoder.max_position, (12, n_dim), generator=seeded())
    e, slow = encoder(positions), slow_encoder(encoder, positions)
    assert_close(e, slow, rtol=0, atol=1e-10)
    assert_close(encoder(positions[0]), e[0])       # a single position
    check_gradients((e * randn(12, 16)).sum(), encoder)
    assert encoder(positions.short()).equal(e)
    assert encoder(positions[:0]).shape == (0, 16)      # generating nothing encodes an empty window


def test_seqpe_starts_as_the_paper_says():
    """N(0, 0.02), layer norms of 1, biases of 0, also where it was made without memory and is drawn anew."""
    with torch.device("meta"):
        encoder = SeqPE(64, n_dim=2)
    assert (encoder.base, encoder.max_position, encoder.n_digits, encoder.head_norm) == (10, 20_000, 5, None)
    encoder.to_empty(device="cpu").apply(lambda part: [p.data.fill_(math.nan) for p in part.parameters()])
    drawn(0, encoder.reset_parameters)
    for name, parameter in [*encoder.named_parameters(), *drawn(0, SeqPE, 64, n_dim=2).named_parameters()]:
        if parameter.dim() == 1 and name != "cls":
            assert (parameter == (1 if "ln" in name and "weight" in name else 0)).all(), name
        else:
            within = 4 * 0.02 / math.sqrt(parameter.numel())
            assert abs(parameter.mean()) < within and abs(parameter.std() - 0.02) < within, name


@pytest.mark.parametrize("base, max_position, n_digits", [
    (10, 1000, 3), (10, 1001, 4), (10, 2, 1), (2, 2 ** 30, 30), (5, 25, 2), (5, 26, 3), (1000, 2 ** 30, 4)])
def test_limit_base_and_digits_go_together(base, max_position, n_digits):
    encoder = SeqPE(8, base=base, max_position=max_position)
    assert (encoder.n_digits, encoder.max_position) == (n_digits, max_position)
    e = encoder(torch.tensor([[0], [max_position - 1]]))
    assert e.isfinite().all() and not e[0].equal(e[1])
    for wrong, named in ((max_position, f"0 to {max_position}"), (-1, "-1 to 0")):
        with pytest.raises(ValueError, match=f"positions {named} .*holds 0 to {max_position - 1};"):
            encoder(torch.tensor([[0], [wrong]]))
        with pytest.raises(IndexError), patch("torch.compiler.is_compiling", return_value=True):
            # Unchecked: past the digits an error, never another number.
            encoder(torch.tensor([[0], [wrong if wrong < 0 else base ** n_digits]]))


# ---- The two regularisers, and start shifting


def single_edits(digits, base):
    """What a tuple of digits becomes by an edit, each result as often as it is drawn of base ** 2 K ** 2."""
    n = len(digits)
    for at, other, new in itertools.product(range(n), range(n), range(base)):
        yield (*digits[1:at + 1], new, *digits[at + 1:])
        yield (0, *digits[:at], *digits[at + 1:])
        swapped = list(digits)
        swapped[at], swapped[other] = digits[other], digits[at]
        yield tuple(swapped)
    for at, new in itertools.product(range(n), range(1, base)):
        yield from [(*digits[:at], (digits[at] + new) % base, *digits[at + 1:])] * n


@pytest.mark.parametrize("n_dim, n_digits, pivot", [(1, 5, [2345]), (2, 2, [18, 9]), (1, 1, [3])])
def test_hard_negatives_are_one_to_three_edits_away(n_dim, n_digits, pivot):
    encoder, n = SeqPE(8, n_dim=n_dim, base=5, max_position=5 ** n_digits), 40000
    pivots = torch.tensor([pivot, [0] * n_dim])
    found = drawn(0, sample_hard_negatives, encoder, pivots, n)
    assert found[1].lt(5).all(-1).float().mean() > 1 / 4      # those of 0: zeros, and at most a single digit
    start, *found = map(tuple, position_to_digits(torch.cat([pivots[:1], found[0]]), n_digits, 5).tolist())
    found = Counter(found)
    reached = [{start}]     # after 0, 1, 2, 3 edits
    for _ in range(3):
        reached.append({result for digits in reached[-1] for result in single_edits(digits, 5)})
    assert set(found) <= reached[3] and (n_digits < 4 or set(found) & (reached[3] - reached[2]))
    # A third are edited once, each kind of edit as likely as any other; more edits can only add to these.
    once = Counter(single_edits(start, 5))
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


@pytest.mark.parametrize("n_dim, max_position, M", [(1, 20_000, 32), (2, 100, 64)])
def test_the_papers_groups_are_as_in_the_authors_code(monkeypatch, n_dim, max_position, M):
    """Half plain; in three tenths true hard negatives; in two a box of 256 positions anywhere."""
    hard, plain = [], SeqPE(8, n_dim=n_dim, max_position=max_position)
    monkeypatch.setattr(seqpe, "sample_hard_negatives",
                        lambda *args: hard.append(sample_hard_negatives(*args)) or hard[0])
    groups = drawn(0, sample_groups, plain, 4000, M, True)
    assert 0 <= groups.min() and groups.max() < max_position
    pivots, candidates = groups[:, :1], groups[:, 1:]
    low, high = candidates.amin(1), candidates.amax(1)                                  # (P, n_dim)
    side = {1: 256, 2: 16}[n_dim]
    boxed = (high - low < side).all(-1)
    assert boxed.double().mean() == pytest.approx(0.2, abs=0.03) and (high - low)[boxed].max() == side - 1
    inside = ((low <= pivots[:, 0]) & (pivots[:, 0] <= high)).all(-1)[boxed].double().mean()
    assert inside == pytest.approx((side / max_position) ** n_dim, abs=0.015)
    starts = torch.histc(low[boxed].double(), 4, 0, max_position - side) / boxed.sum() / n_dim
    assert starts.sub(0.25).abs().max() < 0.06                                          # anywhere
    distance = (candidates - pivots).pow(2).sum(-1).masked_fill((candidates == pivots).all(-1), 2 ** 60)
    nearest, n_hard = distance.min(1), M // 5
    assert n_dim == 2 or (nearest.values <= 1).double().mean() < 0.01
    is_hard = (candidates[:, :n_hard] == hard[0]).all(-1)                               # (P, n_hard)
    of_hard = is_hard.sum(1) > n_hard / 4
    assert of_hard.double().mean() == pytest.approx(0.3, abs=0.05)
    positive = is_hard.gather(1, nearest.indices.clamp(max=n_hard - 1)[:, None]).squeeze(1)
    assert (positive & (nearest.indices < n_hard))[of_hard].double().mean() < 0.01


@pytest.mark.parametrize("shape, max_pieces", [((64,), 1), ((64,), 4), ((12, 16), 2), ((2, 3, 4), 2)])
def test_windows_come_in_pieces_that_keep_their_order(shape, max_pieces):
    windows = drawn(0, place_windows, shape, 800, 1000, max_pieces)
    assert windows.shape == (800, math.prod(shape), len(shape))
    assert 0 <= windows.min() < 20 and 980 < windows.max() < 1000
    for axis, size in enumerate(shape):
        offsets = (windows - window(shape))[..., axis].view(800, *shape)
        stairs = offsets.movedim(axis + 1, 1).reshape(800, size, -1)
        assert (stairs == stairs[..., :1]).all() and stairs.diff(dim=1).ge(0).all()
        n_pieces = 1 + stairs[..., 0].diff().gt(0).sum(1)
        assert n_pieces.max() <= max_pieces
        for n in range(1, max_pieces + 1) if size >= 12 else ():    # in a short one cuts fall together
            assert (n_pieces == n).sum() > 800 * 0.5 / max_pieces


def slow_counts(positions):
    """The number of each position's piece, and what its key counts for: that piece's span / n."""
    steps = [after - before for before, after in itertools.pairwise(positions)]
    piece = list(itertools.accumulate((step != 1 for step in steps), initial=0))
    last = [max(i for i, n in enumerate(piece) if n == k) for k in range(piece[-1] + 1)]
    behind = [max(0, steps[i] - 1) if i < len(steps) else 0 for i in last]
    return piece, [(behind[n] + piece.count(n)) / piece.count(n) for n in piece]


def test_count_bias_equals_a_loop():
    torn = drawn(0, place_windows, (12,), 40, 300, 4)
    torn[-1, :, 0] = torch.tensor([5, 6, 7, 100, 101, 0, 1, 9, 10, 3, 3, 4])    # packed texts: positions fall
    bias = drawn(1, count_bias, torn)
    assert bias.shape == (40, 1, 12, 12) and bias.isfinite().all()
    share = drawn(1, torch.rand, 40, 1).squeeze(1).tolist()
    for matrix, positions, u in zip(bias.squeeze(1), torn.squeeze(-1).tolist(), share):
        piece, counts = slow_counts(positions)
        slow = [[u * math.log(counts[j]) if p < p_i else 0.0 for j, p in enumerate(piece)] for p_i in piece]
        assert_close(matrix.tril(), torch.tensor(slow))     # the keys that a query sees
    assert bias.amax((1, 2, 3)).gt(0.1).sum() > 15          # many windows are torn
    assert (count_bias(place_windows((12,), 5, 300, 1)) == 0).all()


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


@pytest.mark.parametrize("n_head, paper", [(3, False), (2, True), (1, False)])
@pytest.mark.parametrize("n_dim, highest", [(1, 12), (2, 4), (3, 2 ** 30)])
def test_contrastive_loss_equals_a_loop(n_dim, highest, n_head, paper):
    """The paper's, of one pivot and whole vectors, and ours."""
    positions = torch.randint(highest, (6, 15, n_dim), generator=seeded())
    if highest > 100:       # rivals that only exact integers tell apart
        positions = highest - 1 - positions % 100
        positions[:, ::2] %= 100
    else:       # with copies of the pivot, and others as near as the nearest
        positions[0, :5] = torch.tensor([2, 2, 1, 3, 3]).unsqueeze(-1)
    e = randn(6, 15, 6).requires_grad_()
    loss = contrastive_loss(e, positions, n_head, paper)
    slow = slow_contrastive_loss(e.detach(), positions, *((1, 1) if paper else (n_head, 15)))
    assert loss.shape == () and loss.item() == pytest.approx(slow)
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


@pytest.mark.parametrize("n_head, m, n_students, paper", [(1, 7, 3, False), (2, 2, 1, True), (4, 7, 2, True)])
def test_distillation_loss_equals_a_loop_and_teaches_only_the_students(n_head, m, n_students, paper):
    e_teacher, e_students = randn(m, 8).requires_grad_(), randn(n_students, m, 8, seed=1).requires_grad_()
    loss = distillation_loss(e_teacher, e_students, n_head, paper)
    assert loss.shape == () and loss > 1e-3
    assert_close(loss, slow_distillation_loss(e_teacher, e_students, n_head) / (m if paper else 1))
    loss.backward()
    assert e_teacher.grad is None
    assert e_students.grad.isfinite().all() and e_students.grad.count_nonzero() == e_students.numel()


@pytest.mark.parametrize("shape, paper", [((20,), False), ((20,), True), ((4, 5), False), ((4, 5), True)])
@pytest.mark.parametrize("near_weight, far_weight", [(0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_position_regularizers_are_the_two_losses(shape, paper, near_weight, far_weight):
    encoder, read = make_encoder(len(shape), max_position=60), []
    encoder.register_forward_hook(lambda *_: read.append(1))
    loss = drawn(7, position_regularizers, encoder, shape, near_weight, far_weight, 6, paper)
    assert len(read) == (near_weight > 0) + (far_weight > 0)    # a weight of zero costs nothing
    assert position_regularizers(encoder, shape, 0, 0) == 0
    P, M, S, m = ((16, 32, 16, 32) if len(shape) == 1 else (32, 64, 32, 64)) if paper else (6, 32, 4, 32)
    torch.manual_seed(7)
    slow = 0.0
    if near_weight:
        groups = sample_groups(encoder, P, M, paper)
        slow += near_weight * contrastive_loss(encoder(groups), groups, 2, paper)
    if far_weight:
        students, chosen = place_windows(shape, S, 60, 1), torch.randperm(20)[:m]
        e_teacher, e_students = encoder(window(shape)[chosen]), encoder(students[:, chosen])
        slow += far_weight * distillation_loss(e_teacher, e_students, 2, paper)
    assert_close(loss, slow)
    check_gradients(loss, encoder)


@pytest.mark.parametrize("shape", [(16,), (4, 4)])
def test_pretraining_lowers_the_losses_or_says_that_they_are_not_finite(shape):
    encoder = drawn(0, SeqPE, 16, 2, n_layer=1, n_dim=len(shape), max_position=30, head_norm=3.0)
    losses, seen = [], []
    for _ in range(2):
        losses.append(drawn(9, position_regularizers, encoder, shape, 1.0, n_groups=32).item())
        pretrain_encoder(encoder, shape, 40, 5e-3, progress=lambda steps: seen.append(steps) or steps)
    assert losses[1] < 0.9 * losses[0] and seen[0] == range(40)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    with pytest.raises(ValueError, match=r"step \d: reset_parameters.*float32 or a lower rate"):
        pretrain_encoder(drawn(0, SeqPE, 16, 2, n_dim=len(shape), max_position=30).half(), shape)


# ---- Attention, the encodings, GPT and ViT; the GPU path without a GPU, errors, and sections of the file


ATTEND = {      # name: (heads of keys, queries, causal, mask)
    "plain": (4, 7, True, None), "grouped": (2, 7, True, None), "the last three": (4, 3, True, None),
    "one, grouped": (1, 1, True, None), "images": (4, 7, False, None),
    "numbers": (4, 7, True, randn(2, 1, 7, 7, seed=9)), "of the last": (2, 3, True, randn(3, 7, seed=9)),
    "booleans": (4, 7, True, torch.arange(7) > torch.tensor([[2], [0]])[:, None, None] - 1),
    "padding": (2, 7, False, (torch.arange(7) < 5).expand(7, 7).long()),
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
        p = torch.tensor(logits, dtype=torch.float64).softmax(0)
        if p.isfinite().all():      # a query that sees nothing has no answer
            assert_close(y[b, h, i], p @ v[b, h // group], rtol=0, atol=1e-10)
    assert mask is not None or not torch.allclose(y, attend(q, k, v, causal=causal))


SOME = torch.tensor([[0], [3], [4], [9], [250], [260], [700]])
GRID = torch.tensor([[0, 0], [0, 3], [2, 1], [7, 5], [3, 9]])


def check_attention(model, positions, logit, atol=1e-10):
    """Each layer's attention under the model's signals is one with logit(layer, head, q_i, k_j, i, j)."""
    x, first = randn(len(positions), 16, seed=3), int(model.pe.class_token)
    for layer, (block, signal) in enumerate(zip(model.blocks, model.pe(positions), strict=True)):
        attn = block.attn
        slow = slow_attention(x, attn.state_dict(), "", attn.causal, attn.n_head, partial(logit, layer))
        signal = Signal(*(t if t is None else t[..., first:, :] for t in signal))   # without a class token's
        fast = attn(x.unsqueeze(0), signal).squeeze(0)
        assert_close(fast, slow, rtol=0, atol=atol)
        assert (fast - attn(x.unsqueeze(0))).abs().max() > 0.01      # the encoding has a say


@pytest.mark.parametrize("n_head", [2, 8])
def test_alibi_adds_to_attention(n_head):
    check_attention(make_gpt("alibi", n_head=n_head), SOME, atol=1e-4, logit=lambda layer, head, q, k, i, j: (
        q @ k / math.sqrt(16 / n_head) - 2 ** (-8 * (head + 1) / n_head) * float(SOME[i] - SOME[j])))


@pytest.mark.parametrize("make, positions", [(make_gpt, SOME), (make_vit, GRID)], ids=["GPT", "ViT"])
@pytest.mark.parametrize("fusion, settings", [("scalar", {}), ("mul", {}), ("add", {}),
                                              ("scalar", dict(pe_embd=6, head_norm=3.0, base=7))])
def test_seqpe_enters_attention_as_the_paper_writes(make, positions, fusion, settings):
    model = make(f"seqpe-{fusion}", **settings)
    e = slow_encoder(model.pe.encoder, positions)
    assert len(model.pe.maps) == (1 if fusion == "scalar" and make is make_gpt else 2)
    assert (e.size(-1), model.pe.encoder.head_norm) == ((6, 3.0) if settings else (16, None))

    def logit(layer, head, q, k, i, j):
        W = model.pe.maps[layer % len(model.pe.maps)]
        e_q, e_k = ((W.weight @ e[end] + W.bias).detach().chunk(4)[2 * way + head]
                    for way, end in enumerate((i, j)))
        return {"scalar": lambda: q @ k + e_q @ e_k, "mul": lambda: (q * e_q) @ (k * e_k),
                "add": lambda: (q + e_q) @ (k + e_k)}[fusion]() / math.sqrt(8)

    check_attention(model, positions, logit)


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
    pe, share = make(encoding).pe, 16 // positions.size(1)
    first, second = pe(positions)
    assert second == Signal() and first == Signal(input=first.input)
    if encoding == "seqpe-input":
        slow = pe.input_gain.item() * slow_encoder(pe.encoder, positions)
    elif encoding == "learned":
        slow = torch.stack([pe.table[tuple(position)] for position in positions.tolist()])
    else:       # each coordinate has its share of the channels: sines, then cosines
        slow = torch.tensor([[wave(p * 10000 ** (-c / (share // 2))) for p in position
                              for wave in (math.sin, math.cos) for c in range(share // 2)]
                             for position in positions.tolist()]) * pe.input_gain.item()
    slow = slow if pe.cls is None else torch.cat([pe.cls[None], slow])
    assert_close(first.input, slow, rtol=0, atol=1e-5, check_dtype=False)


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
        assert shapes and not [shape for shape in shapes if shape.count(T) > 1 or shape.numel() >= T * T]


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
        e = model.pe.embed(window(old)).T.reshape(1, -1, *old)
        e = F.interpolate(e, size=new, mode="linear" if len(old) == 1 else "bicubic", align_corners=False)
        slow = slow + model.pe.fuse(e.flatten(2)[0].T)
    for a, b in zip(tree_leaves(signals * 2), tree_leaves(slow)):
        assert a is b is None or torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_angles_are_not_rounded(autocast):
    rope, far = make_gpt("rope").bfloat16(), torch.tensor([[4999], [5000]])     # else many turns off
    slow = torch.tensor([slow_angles(rope, 0, 0, position) for position in far.tolist()])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_close(rope.pe(far)[1].rotate[:, 0], torch.stack([slow.cos(), slow.sin()]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("make, x, targets", [(make_gpt, tokens(2, 7), tokens(2, 7, seed=1)),
                                              (make_vit, randn(2, 2, 6, 4), torch.tensor([[4], [0]]))])
def test_models_are_plain_transformers(make, x, targets):
    model, losses = make("nope"), []
    weights = model.state_dict()
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
        assert (other[0, t:] - logits[0, t:]).abs().amax(1).min() > 1e-3
    check_gradients(model(idx, tokens(2, 8, seed=1))[1], model)


@pytest.mark.parametrize("make, encoding, x, shape", [
    *((make_gpt, encoding, tokens(3, 8), (8,)) for encoding in TEXT),
    *((make_vit, encoding, randn(3, 2, 8, 8), (4, 4)) for encoding in IMAGE)])
def test_positions_of_a_batch_are_those_of_each_sequence(make, encoding, x, shape):
    model = make(encoding)
    assert_close(model(x, signals=model.pe(window(shape)))[0], model(x)[0])
    positions = torch.stack([window(shape).roll(i, 0) for i in (3, 0, 3)])      # some the same
    together = model(x, signals=model.pe(positions))[0]
    assert_close(model(x, signals=model.pe(positions[:2], torch.tensor([0, 1, 0])))[0], together)
    for b in range(3):
        assert_close(together[b:b + 1], model(x[b:b + 1], signals=model.pe(positions[b]))[0])
    assert torch.allclose(together[::2], model(x)[0][::2]) == (encoding == "nope")


@pytest.mark.parametrize("make, encoding, x, shape", [
    *((gpt, encoding, tokens(3, 8), (8,)) for encoding in [*TEXT, "nope"]),
    *((vit, encoding, torch.ones(3, 2, 8, 8), (4, 4)) for encoding in IMAGE)])
def test_positions_that_do_not_fit_are_refused(make, encoding, x, shape):
    """By shape, at the encoding; by number and by sequences, at the model: never in silence."""
    model, T, n = make(encoding), math.prod(shape), len(shape)
    for wrong in ((T,), (1, T), (T, T), (2, T), (3, T, 3), (T, 3), (1, 3, T, n)):
        with pytest.raises(ValueError, match=rf"\.\.\., T, {n}"):
            model.pe(torch.zeros(wrong, dtype=torch.int64))
    empty = tree_leaves(model.pe(torch.zeros(2, 0, n, dtype=torch.int64)))
    assert all(t is None or t.size(-2) == int(model.pe.class_token) for t in empty)
    windows = torch.stack([window(shape).roll(i, 0) for i in range(3)])
    batches = [(each, x) for each in (windows[0, :1], windows[:, :3], windows[:2])] + [(windows, x[:1])]
    calls = [(model.pe(each), x) for each, x in batches if encoding != "nope"] + [(model.pe(windows)[:1], x)]
    for signals, each in calls:
        with pytest.raises((ValueError, RuntimeError)):
            model(each, signals=signals)


@pytest.mark.parametrize("encoding", IMAGE)
def test_images_of_any_size(encoding):
    """Their patches are at row and column, in an oblong image, too, and those not kept have no say."""
    model = make_vit(encoding)
    for grid in ((2, 4), (3, 1), (4, 4), (3, 7)):
        x = randn(2, 2, 2 * grid[0], 2 * grid[1])
        h = torch.cat([model.cls.expand(2, 1, -1), model.patches(x).flatten(2).transpose(1, 2)], dim=1)
        signals = model.pe.interpolate(grid)
        stretched = model.head(model.transform(h, signals)[:, 0])
        assert_close(model(x, signals=signals)[0], stretched, rtol=0, atol=1e-5)
        if encoding != "learned" or max(grid) <= 4:
            logits = model.head(model.transform(h, model.pe(window(grid)))[:, 0])
            assert_close(model(x)[0], logits)
            assert torch.allclose(logits, stretched, atol=1e-5) == (encoding == "nope" or grid == (4, 4))
    x, upper = randn(4, 2, 8, 8), torch.randperm(8, generator=seeded())     # two rows of four patches
    grids = torch.stack([window((4, 4)).roll(i, 0) for i in (0, 1, 0, 2)])
    assert_close(model(x, kept=upper)[0], model(x[:, :, :4])[0])
    some, all_ = model.pe(grids[:, upper]), model.pe(grids[:, :8])
    assert_close(model(x, signals=some, kept=upper)[0], model(x[:, :, :4], signals=all_)[0])
    check_gradients(model(x, torch.tensor([0, 1, 2, 3]))[1], model)


@pytest.fixture
def reads(monkeypatch):
    """Tensors without content; `meta` is the device. Where Python reads a value is written down."""
    devices = []
    for name, value in (("__bool__", False), ("__int__", 0)):
        read = lambda tensor, value=value: devices.append(tensor.device.type) or value     # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, read)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match="device"):
            torch.ones(3) + torch.ones(3, device="meta")
        yield devices


@pytest.mark.parametrize("make, encoding, where", [
    *((gpt, e, "cpu") for e in TEXT), *((vit, e, "cpu") for e in IMAGE[::2]),
    *((make, e, "meta") for make in (gpt, vit) for e in ("seqpe-scalar", "rope", "learned"))])
def test_models_on_a_device(reads, make, encoding, where):
    """With positions on the host, as the code makes them, the host never waits for a value of the device."""
    with torch.device("meta"):
        model, shape = make(encoding, n_layer=1), (8,) if make is gpt else (4, 4)
    x = torch.zeros(2, 8, dtype=torch.int64) if make is gpt else torch.ones(2, 2, 8, 8)
    targets = x if make is gpt else torch.zeros(2, dtype=torch.int64)
    x, targets, windows = x.to("meta"), targets.to("meta"), place_windows(shape, 2, 100, device=where)
    for signals in (None, model.pe(windows), model.pe.interpolate(shape)):
        if signals and make is gpt:
            signals = [signal._replace(bias=count_bias(windows)) for signal in signals]
        model(x, targets, signals)[1].backward()
    assert model(x, signals=model.pe(windows, torch.tensor([1, 0])))[0].device.type == "meta"
    assert where == "meta" or set(reads) <= {"cpu"}


def test_the_encoder_is_exported_for_any_number_of_positions():
    encoder, T = SeqPE(16, n_dim=2, max_position=50), torch.export.Dim("T", max=1000)
    exported = torch.export.export(encoder, (window((3, 4)),), dynamic_shapes=({0: T},)).module()
    assert_close(exported(window((7, 5))), encoder(window((7, 5))))


@pytest.mark.parametrize("make, encoding", [(gpt, "rope"), (gpt, "alibi"), (gpt, "sinusoidal"), (vit, "rope"),
                                            (vit, "rope_mixed")])
def test_nothing_hangs_on_buffers_or_on_the_default_type(make, encoding):
    """Not what is computed in forward, after to_empty; nor that, and what is sampled, under bfloat16."""
    model, x = make(encoding), tokens(2, 8) if make is gpt else torch.ones(2, 2, 8, 8)
    with torch.device("meta"):
        other = make(encoding)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert not list(model.buffers()) and other(x)[0].equal(model(x)[0])

    def everything():
        windows, encoder = drawn(0, place_windows, (32,), 8, 2000), SeqPE(8, max_position=2000)
        found = [drawn(1, sample_groups, encoder, 50, 32, paper) for paper in (False, True)]
        return tree_leaves([model.pe(3 * window(model.shape)), found, windows, drawn(2, count_bias, windows)])

    before = everything()
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a is b is None or a.equal(b) for a, b in zip(before, after, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("encoding", ["seqpe-scalar", "rope", "alibi"])
def test_a_model_is_traced(encoding):
    model, idx = gpt(encoding).requires_grad_(False), tokens(2, 8)
    assert_close(torch.jit.trace(lambda idx: model(idx)[0], (idx,))(idx), model(idx)[0])


def test_a_training_step_compiles_whole():
    pe = gpt(n_layer=1, max_position=100, n_embd=16, pe_embd=8, head_norm=3).pe

    def step(q, k, v):
        windows, which = place_windows((8,), 8, 100), torch.arange(len(q)) * 8 // len(q)
        windows[4:] = window((8,))
        y = attend(q, k, v, *pe(windows, which)[0].extend.unbind(1), count_bias(windows)[which])
        return y.square().mean() + position_regularizers(pe.encoder, (8,))

    q, k, v = torch.randn(3, 16, 2, 8, 8, generator=seeded())
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert_close(drawn(0, compiled, q, k, v), drawn(0, step, q, k, v))


ERRORS = {
    "float positions": (lambda: SeqPE(8)(torch.ones(3, 1)), RuntimeError, "type"),
    "last dimension": (lambda: SeqPE(8, n_dim=2)(torch.zeros(4, 3).long()), ValueError, r"n_dim=2.*\(4, 3\)"),
    "too many positions": (lambda: SeqPE(8, max_position=2 ** 30 + 1), ValueError, r"2\*\*30"),
    "base": (lambda: SeqPE(8, base=1), ValueError, "SeqPE"),
    "gpt: past the limit": (lambda: gpt()(tokens(1, 1001)), ValueError, "1000 .*0 to 999.*a larger max_"),
    "gpt: rope_mixed": (lambda: gpt("rope_mixed"), ValueError, "rope_mixed is for images"),
    "window too long": (lambda: place_windows((9,), 8, 8), ValueError, r"\(9,\) .*max_position=8"),
    "ek of one key": (lambda: attend(*randn(5, 1, 2, 7, 4)[:4], randn(2, 1, 4)), ValueError, "7, 1 .*7, 7"),
    "vit: image": (lambda: vit()(torch.zeros(1, 2, 8, 9)), ValueError, r"\(8, 9\).*patch_size=2"),
    "vit: alibi": (lambda: vit("alibi")(torch.ones(1, 2, 8, 8)), ValueError, "16, .*17"),
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
    exec(text.split("# ---- 5. Position encodings")[0], alone)
    assert "GPT" not in alone and "TransformerConfig" not in alone
    torch.manual_seed(0)
    encoder = alone["SeqPE"](16, max_position=500)
    alone["pretrain_encoder"](encoder, (20,), 2)
    windows = alone["place_windows"]((20,), 3, 500)
    e = encoder(windows).unsqueeze(1)
    loss = alone["attend"](e, e, e, e, e, alone["count_bias"](windows)).square().sum()
    check_gradients(loss + alone["position_regularizers"](encoder, (20,)), encoder)


# ------------------------------------------------------------------------------------------------------------
# The scripts

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


def outcome(capsys, script, *arguments, odd=()):
    """None where a run ends well, else what it says: one line, after which the exit code is 2 or 130."""
    _, code = capsys.readouterr(), 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("ignore", category=ResourceWarning)
        try:
            train_lm.run_script(lambda: script.main([*command(script, *arguments), *odd]))
        except SystemExit as exit_:
            code = exit_.code
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    lines = [line for line in lines if line and not re.search(r"\d+/\d+ \[", line)]     # progress bars
    assert len(lines) == (code > 0) and not warned, (arguments, odd, code, lines, [*map(str, warned)])
    assert not lines or lines[0].startswith({2: "script.py: ", 130: "stopped: --resume goes on"}[code]), lines
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
    return {path: path.read_bytes() for path in sorted(folder.glob("*" + end), key=lambda p: len(p.name))}


def test_all_encodings_are_trained_and_recorded(script, data, tmp_path, capsys):
    """Table, JSON and SVG say the same; two seeds are two runs; the same seed gives the same numbers."""
    results = run(script, data, tmp_path / "out", "--pe all --seed 0,1 --steps 8")
    printed, form = capsys.readouterr().out, TASK[script].form
    columns = [8, 16, 32, 64, 128] if script is train_lm else [8, 12, 16, 20, 24]
    for (title, rows), record, svg in zip(results.items(), files(tmp_path / "out", ".json").values(),
                                          files(tmp_path / "out", ".svg").values(), strict=True):
        svg, bars_at = ElementTree.fromstring(svg), set()
        assert json.loads(record).items() >= {title: rows, "columns": columns, "steps": 8}.items()
        assert title in printed and list(rows) == TASK[script].encodings
        assert [text.text for text in svg[2:9]] == [*title.split(", by "), *map(str, columns)]
        lines = {g[-1].text: g for g in svg.iter() if g.tag.endswith("}g")}
        assert [pe for pe, g in lines.items() if g.get("class") == "us"] == ["seqpe"]
        found = {pe: [(statistics.mean(each), statistics.stdev(each)) for each in zip(*seeds, strict=True)]
                 for pe, seeds in rows.items()}
        ends = [m + sign * d for row in found.values() for m, d in row for sign in (-1, 1)]
        low, high = (min(ends), max(ends)) if script is train_lm else (0, 100)
        for pe, row in found.items():
            cells = r" *\| *".join(re.escape(f"{m:{form}}±{d:{form}}") for m, d in row)
            assert re.search(rf"^{pe} *\| *{cells}$", printed, re.M)
            line, bars, _ = lines["none" if pe == "nope" else pe]
            points = re.findall(r"([\d.]+),([\d.]+)", line.get("points"))
            bars = re.findall(r"M([\d.]+),([\d.]+)V([\d.]+)", bars.get("d"))
            for j, ((x, y), (at, top, end), (m, d)) in enumerate(zip(points, bars, row, strict=True)):
                m, d = 160 * (m - low) / (high - low), 160 * d / (high - low)
                assert [*map(float, (x, y, top, end))] == pytest.approx(
                    [36 + 45 * j, 200 - m, 200 - m - d, 200 - m + d], abs=0.06)
                bars_at.add(at)
        assert len(bars_at) == 5 * len(rows)            # none hides another
    for title, rows in run(script, data, tmp_path / "1", "--pe rope,seqpe --seed 1 --steps 8").items():
        assert {pe: row for pe, [row] in rows.items()} == {pe: results[title][pe][1] for pe in rows}
        assert script is train_vit or results[title]["seqpe"][0] != results[title]["seqpe"][1]


def test_training_learns_and_is_timed(tmp_path, capsys):
    (tmp_path / "own.txt").write_text("abcdefgh" * 700)
    arguments = train_lm, tmp_path / "own.txt", tmp_path
    run(*arguments, "--pe seqpe,rope --bench")
    row = r"(step|read \d+) +seqpe +[\d.]+ ms \([\d.]+x\) +rope +[\d.]+ ms \(1.00x\)"
    assert [re.fullmatch(row, each)[1] for each in capsys.readouterr().out.splitlines()] == [
        "step", "read 8", "read 32", "read 128", "read 512"]
    results = run(*arguments, "--pe seqpe,rope --steps 60 --lr 1e-2")
    assert all(row[0] < 1.0 < math.log(8) for rows in results.values() for [row] in rows.values())


def test_evaluation_scores_the_same_characters_at_every_length(corpus):
    task, text = task_of(train_lm, corpus, "--reach 4"), corpus.read_text(encoding="utf-8")[2700:]
    model, windows = task.model("rope"), {T: task.windows("test", T) for T in task.sizes}
    assert [*windows] == [8, 16, 32] and all(each[:, -9:].equal(windows[8]) for each in windows.values())
    for T in windows:
        losses = []
        for each in windows[T]:
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


def test_arguments_come_before_recipes_and_those_before_defaults(script, monkeypatch, capsys):
    """And -h shows what will be used, after the script's docstring."""
    monkeypatch.setenv("COLUMNS", "200")
    ours = {name: row[0] for name, row in train_lm.OPTIONS.items()} | TASK[script].defaults
    paper = dict(shift_prob=0.1, shift_whole=1, distill_shifted=0, pieces=1, paper_groups=1, pe_dropout=0.1,
                 pretrain_steps=0, head_norm=0.0, diagonal_maps=0, pe_embd=0)
    more = {"--data recall": ours | dict(steps=1200, lr=1e-3)}
    if script is train_vit:
        more, paper = {"--data x": ours | dict(steps=4000, lr=1e-3, n_embd=96)}, paper | dict(fusion="mul")
    for line, said in {"": ours, "--recipe paper": ours | paper, **more}.items():
        options = parsed(script, line)[0].options
        assert said.items() <= options.items()
        for name, value in {"pieces": 7, "head_norm": 2.5, "pe_dropout": 0.25, "fusion": "add"}.items():
            found = parsed(script, f"{line} --{name.replace('_', '-')} {value}")[0].options
            assert found == options | {name: value}
        with pytest.raises(SystemExit) as exit_:
            script.main([*line.split(), "-h"])
        printed = capsys.readouterr().out
        assert exit_.value.code == 0 and printed.startswith(script.__doc__.strip())
        for name, value in list(options.items())[1:]:
            value = f"{value:.4g}" if type(value) is not str else value
            assert re.search(rf"^  --{name.replace('_', '-')} \S+\s+.*\({value}\)$", printed, re.M), name


@pytest.mark.parametrize("more", ["--recipe paper", "--pe-dropout 0.5"])
def test_any_recipe_is_trained_and_scored_without_dropout(script, data, tmp_path, monkeypatch, capsys, more):
    """--resume shows a finished run again, the very same numbers, and does not train."""
    arguments = script, data, tmp_path / "out", f"--shift-prob 1 --steps 10 --resume {more}"
    results, printed = run(*arguments), capsys.readouterr().out
    assert "e_i . e_j, 0 to " in printed and all(title in printed for title in results)
    steps, (path,) = on_step(monkeypatch, 0, None), files(tmp_path / "out", ".pt")
    monkeypatch.setattr(torch, "set_rng_state", lambda state: torch.manual_seed(1))
    assert run(*arguments) == results and not steps.called
    assert capsys.readouterr().out == f"{path}: finished\n{printed}"


@pytest.mark.parametrize("pe, length", [("rope", 16), ("learned", 8)])
def test_the_sample_goes_on_from_the_prompt(corpus, tmp_path, capsys, pe, length):
    """To twice the training length, or to what the learned table holds; half of that is read at most."""
    shown = []
    for prompt, seed in (("abé", 0), ("abé", 0), ("abé", 1), ("bcdefabcdéfab", 0)):
        task = task_of(train_lm, corpus, f"--sample {prompt}")
        torch.manual_seed(0)
        task.show(task.model(pe), seed)
        shown.append(capsys.readouterr().out[1:-1])
        assert len(shown[-1]) == length and shown[-1].startswith(prompt[-length // 2:])
    assert shown[0] == shown[1] != shown[2]
    assert "the data has not: 'Z'" in outcome(capsys, train_lm, corpus, tmp_path / "out", "--sample aZ")


def test_files_are_named_after_what_makes_a_run_what_it_is(script):
    """No two commands with different results share a file, even where a long name is cut; others do."""
    def name(line):
        args = parsed(script, line)[0]
        return train_lm.path_of(args, ",".join(args.pe), args.seed, ".pt").name

    assert name("--data a/x.y --lr 0.002 --seed 1,2 --pe rope,nope") == "x.y-rope,nope-lr=0.002-seed1,2.pt"
    options = parsed(script, "")[0].options
    changed = [f"--{option.replace('_', '-')} {least if least != options[option] else most}"
               for option, (*_, least, most, _) in train_lm.OPTIONS.items()]
    changed += [f"{flag} 16" for flag in SIZE[script].split()[::2]]
    changed += ["--fusion add", "--recipe paper", f"--data {62 * chr(0x6587)}", "--pe rope", "--seed 1"]
    seeds = ["--seed " + ",".join(map(str, range(n))) for n in (50, 51)]
    names = [name(line) for line in ["", *changed, *seeds]]
    names += [name(" ".join([*changed, more])) for more in ("", "--lr 1", "--pe nope", *seeds)]
    assert len(set(names)) == len(names) and max(len(each.encode()) for each in names) < 155
    same = [f"--{option.replace('_', '-')} {value}" for option, value in options.items()]
    same += ["--out x", "--split val", "--device cpu", "--pe seqpe,seqpe", "--resume"]
    assert {name(line) for line in same} == {name("")}


def test_long_names_run_to_their_end_and_find_their_files(corpus, tmp_path):
    """Of data, and of a list of seeds. What the two scripts read may have one name but for its end."""
    n_files, out, seeds = 0, tmp_path / "out", ",".join(str(2 ** 32 - i) for i in range(4))
    for script, data in ((train_lm, corpus), (train_vit, write_npz(tmp_path / "own.npz"))):
        data = data.rename(tmp_path / ("\u6587" * 62 + data.suffix))                    # 190 bytes
        arguments = script, data, out, f"--pe rope --steps 1 --seed {seeds}"
        results, n_now = run(*arguments), len(files(out))
        assert n_now == n_files + 4 + 2 * len(results)
        assert run(*arguments[:3], arguments[3] + " --resume") == results and len(files(out)) == n_now
        run(*arguments[:3], arguments[3] + " --resume --split val")
        n_files = n_now + 2 * len(results)          # as these are tables of their own
    assert len(files(out)) == n_files and max(len(path.name.encode()) for path in files(out)) < 200


def test_resume_gives_the_weights_of_an_uninterrupted_run(script, data, tmp_path, monkeypatch, capsys):
    """Bit for bit, with dropout, from the last of every hundred steps. A symbolic link stays one."""
    out, disk, stop = tmp_path / "out", tmp_path / "disk.pt", KeyboardInterrupt
    more = "--steps 104 --pe-dropout 0.1 --resume"
    run(script, data, tmp_path / "whole", more)
    for n, error, said, steps in ((2, stop, "stopped: ", []), (102, stop, "stopped: ", [100]),
                                  (3, MemoryError, "out of memory", [100]), (0, None, "None", [104])):
        with monkeypatch.context() as patch:
            on_step(patch, n, error)
            assert said in str(outcome(capsys, script, data, out, more))
        assert [torch.load(path)["step"] for path in files(out, ".pt")] == steps
        if n == 102:
            (path,) = files(out)
            path.rename(disk)
            path.symlink_to(disk)
    (whole,), resumed = map(torch.load, files(tmp_path / "whole", ".pt")), torch.load(disk)
    assert path.is_symlink() and all(map(torch.equal, whole["random"], resumed["random"]))
    assert all(torch.equal(weights, resumed["model"][name]) for name, weights in whole["model"].items())


def test_an_interrupted_run_shows_and_keeps_what_is_finished(script, data, tmp_path, monkeypatch, capsys):
    """And so does one with weights that are not finite; none of these is saved, and no earlier table lost."""
    arguments, titles = (script, data, tmp_path / "out", "--pe rope,nope,seqpe --resume"), TASK[script].tables
    for n, action, error, said in (
            (13, KeyboardInterrupt, KeyboardInterrupt, None),
            (3, lambda loss: loss * math.nan, ValueError, "^nope at step 10: weights that are not finite")):
        with monkeypatch.context() as patch, pytest.raises(error, match=said):
            on_step(patch, n, action)
            run(*arguments)
        printed = capsys.readouterr().out
        assert re.findall(r"^(rope|nope) +\|", printed, re.M) == ["rope"] * len(titles)
        assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".pt"]
    with monkeypatch.context() as patch:        # the encoder's own training ends at once, too
        patch.setattr(seqpe, "position_regularizers", regularizers := Mock(side_effect=KeyboardInterrupt))
        assert outcome(capsys, *arguments).startswith("stopped") and regularizers.call_count == 1
    steps, results, printed = on_step(monkeypatch, 0, None), run(*arguments), capsys.readouterr().out
    assert re.findall(r"-(rope|nope|seqpe)-.*: finished$", printed, re.M) == ["rope", "nope"]
    assert steps.call_count == 10 and all([*rows] == ["rope", "nope", "seqpe"] for rows in results.values())


def test_stopped_at_any_moment_a_run_can_be_resumed(corpus, tmp_path):
    """Two of the same command in one folder, one by kill -9, one by Ctrl-C."""
    line = [sys.executable, train_lm.__file__, *command(train_lm, corpus, tmp_path, "--steps 5000 --resume")]
    processes = [subprocess.Popen(line, text=True, stderr=subprocess.PIPE,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    for process in processes:
        said = ""
        while "seqpe: " not in said:            # the progress bar of the model's training
            said += process.stderr.read(1)
            assert process.poll() is None, said
    while not files(tmp_path, ".pt"):
        time.sleep(0.01)
    for process, number, code in zip(processes, (signal.SIGKILL, signal.SIGINT), (-9, 130)):
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(100) == code and "Traceback" not in said
    assert said.splitlines()[-1].startswith("stopped: --resume goes on")
    (path,) = files(tmp_path, ".pt")
    assert train_lm.read_checkpoint(path, torch.load(path)["settings"]) % 100 == 0


def test_any_console(corpus, tmp_path, monkeypatch, capsys):
    """One without the characters that are printed, and one that goes away, as in | head -1."""
    arguments, (read, write) = (train_lm, corpus, tmp_path / "out", "--resume"), os.pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed := io.BytesIO(), "ascii", write_through=True))
    assert outcome(capsys, *arguments) is None and b"??" in printed.getvalue()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(write, "w"), write_through=True))
    assert "Broken pipe" in outcome(capsys, *arguments)


def test_an_earlier_run_is_not_overwritten(script, data, tmp_path, monkeypatch, capsys):
    """Not without --resume, and not after other data: the same in another order, all with the same name."""
    out = tmp_path / "out"
    run(script, data, out, "--pe rope")
    before, (path,), steps = files(out), files(out, ".pt"), on_step(monkeypatch, 0, None)
    said = outcome(capsys, script, data, out, "--pe nope,rope")
    assert said == f"script.py: {path} exists: --resume goes on or shows it again, another --out starts anew"
    if script is train_vit:
        write_npz(data, **{name: array[::-1] for name, array in np.load(data).items()})
    else:
        data.write_text(data.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    said = outcome(capsys, script, data, out, "--pe nope,rope --resume")
    assert re.search(rf"{path}: checksum of the data is \d+ there, \d+ here; use another --out", said)
    assert files(out) == before and not steps.called


def test_a_damaged_or_foreign_checkpoint_is_one_line_that_names_it(script, data, corpus, tmp_path, capsys):
    arguments, theirs = (script, data, tmp_path / "out", "--pe rope --steps 2 --resume"), tmp_path / "theirs"
    other = (train_vit, write_npz(tmp_path / "x.npz")) if script is train_lm else (train_lm, corpus)
    run(*arguments), run(*other, theirs, arguments[-1])
    ((path, whole),), (foreign,) = files(tmp_path / "out", ".pt").items(), files(theirs, ".pt").values()
    good, name = torch.load(path), "blocks.0.mlp.0.weight"
    table = [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(60), b"cos\nsystem\n.", foreign, [good], None,
             *(whole[:n] for n in (1, 500, len(whole) // 2, len(whole) - 1))]
    table += [{key: good[key] for key in good if key != gone} for gone in good]
    table += [good | {"model": good["model"] | {name: matrix}} for matrix in (good["model"][name][1:], None)]
    table += [good | {key: value} for key in good for value in ([], {}, "x")]
    table += [good | {"settings": good["settings"] | {name: [8]}} for name in good["settings"]]
    for content in table:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert f"{path}: " in outcome(capsys, *arguments), content
    rng, archive = random.Random(0), zipfile.ZipFile(io.BytesIO(whole))
    for member in archive.infolist():           # of each array, a bit is flipped
        at = whole.index(archive.read(member), member.header_offset + 30) + rng.randrange(member.file_size)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        with pytest.raises(ValueError, match=f"{path}: no checkpoint of this script, or damaged"):
            train_lm.read_checkpoint(path, good["settings"])


def test_what_cannot_be_written_is_one_line(script, data, tmp_path, monkeypatch, capsys):
    """Before the first step, if it can be. What was there stays; tables are printed without charts, too."""
    steps, out, more = on_step(monkeypatch, 0, None), tmp_path / "out", "--pe rope --resume"
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    for wrong in (data, data / "out"):
        assert str(data) in outcome(capsys, script, data, wrong, more)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", full)
        assert "No space left" in outcome(capsys, script, data, out, more)
    assert not steps.called and not files(out)
    results, (chart, *_), before = run(script, data, out, more), files(out, ".svg"), files(out)
    for place, name in ((os, "fsync"), (os, "replace"), (train_lm, "open")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"write {chart}: No space left"):
            patch.setattr(place, name, full, raising=False)
            run(script, data, out, more)
        printed = capsys.readouterr().out
        assert all(f"{title}\n\nencoding" in printed for title in results) and files(out) == before


def test_data_that_cannot_be_used_is_one_line(corpus, tmp_path, capsys):
    npz, grey, n = tmp_path / "own.npz", np.zeros((40, 6, 5), np.uint8), np.arange(40)
    whole, script = write_npz(npz).read_bytes(), {corpus: train_lm, npz: train_vit}
    encrypted = re.sub(b"(?s)(PK\x03\x04..|PK\x01\x02....).", b"\\1\x01", whole)
    foreign = [b"", b"no zip", b"PK\x03\x04" + bytes(60), random.Random(0).randbytes(5000), encrypted,
               whole[:10], whole[:1000], whole[:-1], dict(labels=None), dict(labels=n.astype(object))]
    wrong = [dict(images=each) for each in (grey / 2, grey[0], grey[:0], grey[:, :0], grey[..., None, None])]
    wrong += [dict(labels=each) for each in (n - 1, n + 10 ** 9, n / 2, n[1:], n[0], n > 0, n.astype(str),
                                             np.full(40, 2 ** 64 - 1, np.uint64))]
    for path, said, table in (
            (corpus, "too few", [b"", b"a", b"a" * 5000, b"ab" * 10]), (npz, "not an .npz file", foreign),
            (corpus, "text file in UTF-8: ", [bytes(range(256)) * 20]), (npz, "images must be uint8", wrong),
            (npz, "5 images are too few", [dict(images=grey[:5], labels=n[:5])])):
        for content in table:
            path.write_bytes(content) if isinstance(content, bytes) else write_npz(path, **content)
            line = outcome(capsys, script[path], path, tmp_path / "out")
            assert f"--data {path}: " in line and said in line, content
        assert f"--data {tmp_path}: " in outcome(capsys, script[path], tmp_path, tmp_path / "out")
    corpus.write_bytes(b"\xef\xbb\xbf" + b"abc\r\n" * 1000)     # a byte order mark is no character
    assert task_of(train_lm, corpus).characters == ["\n", *"abc"]


def test_arguments_that_cannot_be_used_are_one_line(script, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for line, said in {
            "--pe rotary": "known: seqpe, rope,", "--fusion sum": "choice: 'sum'", "--device cuda": "no cuda",
            "--steps 0": "from 1 to 10000000, not 0", "--lr x": "float value: 'x'", "--lr nan": "10, not nan",
            "--load x": "unrecognized arguments: --load", "--batch 3": "--batch", "--steps 1.5": "int value",
            "--pe-dropout -1": "0.9, not -1", "--seed 4294967297": "integers", "--seed 0,": "'0,'"}.items():
        found = outcome(capsys, script, data, tmp_path / "out", line)
        assert found.startswith("script.py: error: ") and said in found
    table = {"--n-head 3": "n_embd=16 is not divisible by n_head=3", "--pe-embd 9": "n_embd=9 and width=9",
             "--pe nope,rope --n-embd 6": "rope needs "}
    table |= {"--data recall --block-size 41": "at least 42"} if script is train_lm else {
        "--image-size 9": "not divisible by patch_size=2"}
    for line, said in table.items():
        assert said in outcome(capsys, script, data, tmp_path / "out", line)
    assert not files(tmp_path / "out")
    rng, n_well, options = random.Random(0), 0, {name: [0, 1, 2, 4, 8, 0.5] for name in train_lm.OPTIONS}
    options |= {"pe": TASK[script].encodings, "fusion": [*seqpe.FUSIONS], "recipe": ["ours", "paper"]}
    bad = [-1, 10 ** 12, "1" + "0" * 5000, "nan", "inf", "", " ", "x", "0x10", "\0", "٣", "²", ",", "--"]
    for i in range(24):             # random ones end well or are one line, too
        odd = []
        for name in rng.sample([*options, "seed"], 2):
            value = rng.choice(options.get(name, [7]) if rng.random() < 0.7 else bad)
            odd += ["--" + name.replace("_", "-"), str(value)]
        n_well += outcome(capsys, script, data, tmp_path / f"{i}", "--steps 2", odd=odd) is None
    assert 3 < n_well < 20


RECORD = re.compile("@([a-z]{2})=([0-9]{3})")


@pytest.fixture(scope="module")
def recall(library):
    """The task on windows of 64 characters, of which 42 are records and questions."""
    with patch.object(sysconfig, "get_path", lambda _: str(library)):
        return task_of(train_lm, "recall", "--block-size 64 --batch-size 16")


def strings(task, text):
    return ["".join(task.characters[i] for i in row) for row in text]


@pytest.mark.parametrize("T", [42, 64, 300])
def test_records_are_asked_for_again_at_the_end(recall, T):
    haystack = torch.full((40, T + 1), recall.characters.index("x"))
    places, same_order = Counter(), 0
    for text in strings(recall, recall.ask(haystack, seeded())):
        records, questions = RECORD.findall(text[:-21]), RECORD.findall(text[-21:])
        assert len(records) == len({key for key, _ in records}) == 3 and sorted(records) == sorted(questions)
        assert len(text) == T + 1 and RECORD.sub("", text) == "x" * (T + 1 - 42)
        places.update(match.start() for match in RECORD.finditer(text[:-21]))
        same_order += records == questions
    assert 0 < same_order < 20
    assert T == 42 or len(places) > min(20, T / 4) and max(places) > T - 40 - T / 10 and min(places) < T / 10


def test_recalls_batches_loss_and_score(recall, library, tmp_path, monkeypatch):
    """Records may repeat. The loss is the answers' and the text's; right is what has the likeliest digits."""
    state, batch = torch.get_rng_state(), recall.batch(seeded(1))
    assert torch.equal(batch, recall.batch(seeded(1))) and not torch.equal(batch, recall.batch(seeded(2)))
    assert torch.equal(torch.get_rng_state(), state) and batch.shape == (16, 65)
    records = [RECORD.findall(text) for text in strings(recall, batch)]
    assert {(len(r), len(set(r))) for r in records} == {(6, 1), (6, 2), (6, 3)}
    model = recall.model("seqpe").double()
    log_p = model(batch[:, :-1])[0].log_softmax(-1)
    nats = -log_p.gather(-1, batch[:, 1:, None]).squeeze(-1)
    answers = [64 - 21 + 7 * question + 4 + digit for question in range(3) for digit in range(3)]
    assert_close(recall.loss(model, batch, None, None), nats[:, answers].mean() + nats.mean())
    wrong, asked = (torch.rand(256, 64, generator=seeded()) < 0.2).long(), []
    monkeypatch.setattr(recall, "predict", lambda model, text: asked.append(text) or F.one_hot(
        (text[:, -64:] + wrong) % len(recall.characters)))
    right = (wrong[:, answers].view(-1, 3, 3) == 0).all(-1).double().mean().item()
    for T in (64, 256):
        assert recall.score(model, "val", T) == pytest.approx(100 * right) and asked[-1].shape == (256, T + 1)
        assert all(len(RECORD.findall(text)) == 6 for text in strings(recall, asked[-1]))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    results = run(train_lm, "recall", tmp_path / "out", "--block-size 48 --steps 2 --pe learned --reach 4")
    assert [len(row) for rows in results.values() for row in rows["learned"]] == [3]


@pytest.mark.parametrize("whole, pieces", [(0, 4), (0, 1), (1, 4), (1, 1)])
def test_what_a_step_gives_the_model(script, data, monkeypatch, whole, pieces):
    """Sequences share eight windows: a part of them is shifted, or all by chance; then perhaps no L_OOD."""
    more = f"--batch-size 20 --pieces {pieces} --distill-weight 0.5 --shift-whole {whole}"
    more += " --distill-shifted 0" * (pieces == 1)
    task, weights, n_plain = task_of(script, data, more), [], 0
    model = Mock(return_value=(None, 7.0), shape=(8,) if script is train_lm else (4, 4))
    model.pe.side_effect = lambda windows, which: [Signal(input=windows[which])] * 2
    plain, placed = seqpe.window(model.shape), place_windows(model.shape, 8, 99, pieces) + 1
    monkeypatch.setattr(train_lm, "place_windows", lambda *_: placed.clone())
    monkeypatch.setattr(train_lm, "count_bias", lambda windows: -windows)
    monkeypatch.setattr(train_lm, "position_regularizers", lambda *x, **_: weights.append(x[2:]) or 0.25)
    torch.manual_seed(0)
    for task.args.shift_prob in [0.4] * 40 + [0.0]:
        batch = task.batch(seeded())
        assert train_lm.training_loss(task, model, batch, task.args) == (7.0, 0.25)
        x, y, signals, *kept = model.call_args.args
        for got, said in zip((x, y, *kept), batch if kept else (batch[:, :-1], batch[:, 1:]), strict=True):
            assert got.equal(said)
        n_shifted = 0 if signals is None else 8 if whole else 3
        windows = torch.cat([placed[:n_shifted], plain.expand(8 - n_shifted, -1, -1)])
        windows = windows[(torch.arange(20) * 8 + 7) // 20][:, kept[0] if kept else slice(None)]
        for each in signals or []:
            assert each.input.equal(windows)
            assert each.bias is None if kept or pieces == 1 else each.bias.equal(-windows)
        assert weights.pop() == (0.1, 0.0 if pieces == 1 and n_shifted else 0.5) and not weights
        n_plain += not n_shifted
    assert 15 < n_plain < 32 if whole else n_plain == 1


def test_heat_map_is_a_picture_of_the_dot_products():
    torch.manual_seed(0)
    encoder = SeqPE(8, 2)       # 0 to 19,999, five digits: the longest carry is that to 10000
    title, *lines = train_lm.heat_map(encoder, size=8).splitlines()
    assert re.fullmatch(r"e_i \. e_j, 0 to 7 +e_i \. e_j, 9996 to 10003 *", title) and len(lines) == 4
    for start, column in ((0, 0), (9996, 10)):
        e = encoder(torch.arange(start, start + 8).unsqueeze(-1))
        grey = e @ e.T - (e @ e.T).min()
        for line, pixels in zip(lines, (2 * (grey[::2] + grey[1::2]) / grey.max()).round().int()):
            assert line[column:column + 8] == "".join(" ░▒▓█"[i] for i in pixels)


def test_the_digits_are_ucis_and_each_is_in_one_split():
    path = Path(train_vit.__file__).parent / "data" / "digits.csv.gz"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in (path.parent / "README.md").read_text()
    images, labels = train_vit.read_images("digits", 32)
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 240
    every, *splits = [torch.cat([images.flatten(1), labels[:, None]], dim=1).tolist() for images, labels in (
        (images, labels), *task_of(train_vit, "digits").splits.values())]
    assert [len(split) for split in splits] == [1199, 200, 398] and sorted(sum(splits, [])) == sorted(every)
    assert all({row[-1] for row in split} == {*range(10)} for split in splits)


def test_images_of_ones_own(tmp_path):
    """Grey or in colour, smaller or larger, labelled in any kind of integers; large ones lose no pixels."""
    for shape, dtype in ((6, 5), ">i4"), ((9, 4, 3), "u2"), ((8, 8, 1), "u8"), ((3, 3), "i1"):
        images = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
        path = write_npz(tmp_path / "own.npz", images=images, labels=(np.arange(40) % 3).astype(dtype))
        found, labels = train_vit.read_images(path, 16)
        assert torch.equal(found.movedim(1, -1), torch.from_numpy(images.reshape(40, *shape[:2], -1)))
        assert labels.equal(torch.arange(40) % 3)
        assert run(train_vit, path, tmp_path / f"{dtype}", "--steps 3 --pe rope")
    stripes = np.tile(np.array([0, 255, 0, 0], np.uint8), (250, 36, 9))[..., None].repeat(3, -1)
    found = train_vit.read_images(write_npz(path, images=stripes, labels=np.arange(250) % 3), 9)[0]
    assert found.shape == (250, 3, 9, 9) and found.dtype == torch.uint8
    assert (found[..., 1:-1].float() - 255 / 4).abs().max() < 8     # every fourth pixel alone: 0 or 255


def test_augmented_images_are_parts_of_the_image(monkeypatch):
    images, state = train_vit.read_images("digits", 32)[0][:6], torch.get_rng_state()
    first, second, third = (train_vit.augment(images, 16, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third) and first.shape == (6, 1, 16, 16)
    assert torch.equal(torch.get_rng_state(), state) and first.min() >= -1 and first.max() <= 1

    def augmented(*drawn):          # zoom, angle, x and y, each of which is drawn uniformly from 0 to 1
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(drawn)[:, None].expand(4, 6))
        return train_vit.augment(images, 8, None)

    no_zoom, same = math.sqrt(math.log(1 / 0.75, 4)), images / 255 * 2 - 1
    assert_close(train_vit.draw(images, 8), same)
    assert_close(augmented(no_zoom, 0.5, 0.5, 0.5), same, rtol=0, atol=1e-5)
    assert not torch.allclose(augmented(no_zoom, 1.0, 0.5, 0.5), same, atol=0.1)
    middle = train_vit.draw(images, 24)[..., 8:16, 8:16]       # of the image at 3x; the filters differ a bit
    assert (augmented(1.0, 0.5, 0.5, 0.5) - middle).abs().mean() < 0.05 < (middle - same).abs().mean()
    images.fill_(255)
    assert (augmented(1.0, 0.5, 1.0, 0.5)[..., -1] < 0).all()          # a tenth beyond the border


def test_accuracy_counts_what_is_right_at_every_size_and_steps_look_at_a_share():
    """A model that knows three of four labels. The learned table is interpolated in both tables."""
    task, shown = task_of(train_vit, "digits"), []
    images, labels = task.splits["test"] = [each[:100] for each in task.splits["test"]]         # one batch

    def model(some, signals):
        assert some.equal(train_vit.draw(images, some.size(-1))) and some.min() >= -1 and some.max() <= 1
        shown.append(signals)
        return torch.eye(10)[(labels + (torch.arange(100) % 4 == 0)) % 10], None

    model.shape, model.pe = (4, 4), SimpleNamespace(interpolate=lambda grid: grid)
    for pe, (title, how) in itertools.product(("rope", "learned"), task.tables.items()):
        model.config, stretched = SimpleNamespace(pe=pe), pe == "learned" or "interpolated" in title
        assert [task.score(model, "test", size, **how) for size in (8, 12, 16, 20, 24)] == [75.0] * 5
        assert shown[-5:] == [None, *((n, n) if stretched else None for n in (6, 8, 10, 12))]
    task = task_of(train_vit, "digits", "--keep 0.5")           # a step looks at a random share of patches
    kept = [task.batch(seeded(i))[2] for i in range(200)]
    assert {len(k) for k in kept} == set(range(8, 17))          # of 16
    assert all(len(k.unique()) == len(k) for k in kept) and torch.equal(kept[0], task.batch(seeded(0))[2])
    assert torch.cat(kept).bincount().min() > 100               # any of them


# ------------------------------------------------------------------------------------------------------------
# README.md and data/RESULTS.md

HERE = Path(seqpe.__file__).parent
README, RESULTS = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "data/RESULTS.md"))
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_names_only_options_that_exist(capsys):
    for module in (train_lm, train_vit):
        with pytest.raises(SystemExit):
            module.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) | {"--index-url"}
    named = set(re.findall(r"--[a-z][a-z-]+", README + RESULTS))
    assert "--pe" in named and named <= known, named - known


def test_the_readmes_boxes_fit_the_column():
    boxes = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
    assert boxes and max(len(line) for box in boxes for line in box.split("\n")) <= 95


def test_the_readmes_table_of_differences_is_that_of_the_options():
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([\d.]+) \| ([\d.]+) \|", README, re.M)
    differ = {name.replace("_", "-"): row[:2] for name, row in train_lm.OPTIONS.items() if len(row) > 4}
    assert {name: (float(ours), float(paper)) for name, ours, paper in rows} == differ


def test_the_readme_says_how_large_the_files_are():
    for name, lines in re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", README, re.M):
        assert int(lines) == len((HERE / name).read_text(encoding="utf-8").splitlines()), name


@pytest.mark.parametrize("name, task", [("text", train_lm.Text), ("recall", train_lm.Recall),
                                        ("images", train_vit.Images)])
def test_the_readmes_tables_and_charts_agree(name, task):
    """A chart drawn of the table is the chart that is shown."""
    title = next(iter(task.tables))
    table = rf"^{re.escape(title)}\n\nencoding +\|([^\n]*)\n[-| ]+\n((?:\w+ +\|[^\n]*\n)+)"
    columns, rows = re.findall(table, README, re.M)[-1]
    scores = {}     # two seeds that have this mean and this deviation
    for row in rows.splitlines():
        cells = [(float(m), float(d) / math.sqrt(2)) for m, d in re.findall(r"([\d.]+)±([\d.]+)", row)]
        scores[row.split()[0]] = [[m + sign * d for m, d in cells] for sign in (-1, 1)]
    drawn = train_lm.chart(title, columns.split("|"), scores)
    shown = (HERE / "data" / f"{name}.svg").read_text(encoding="utf-8")
    (ours, theirs) = ({name: [float(at) for at in re.split("[ ,]", points)] for points, name in re.findall(
        r'points="([^"]+)".*?>(\w+)</text></g>', svg, re.S)} for svg in (drawn, shown))
    assert len(ours) == 6 and ours.keys() == theirs.keys()
    assert all(theirs[pe] == pytest.approx(points, abs=0.2) for pe, points in ours.items())


def test_the_commands_run_one_after_another_in_one_folder(tmp_path, library, monkeypatch):
    """In their small form: the same options, then those of a tiny model. None meets another's files."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_lm.Text, "n_evaluated", 2)
    monkeypatch.setattr(train_lm.Recall, "n_evaluated", 2)
    monkeypatch.setattr(train_vit, "MAGNIFICATIONS", (1, 1.5))
    tiny = "--n-layer 1 --n-head 2 --n-embd 16 --pe-embd 8 --batch-size 2".split()
    pieces = re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", README + RESULTS, re.S | re.M)
    commands = re.findall(r"python (train_\w+)\.py\b([^`\n;&]*)", "\n".join(map("".join, pieces)))
    for name, arguments in dict.fromkeys(commands):
        if "FILE" in arguments:
            continue
        arguments = shlex.split(arguments.replace("0,1,2", "0"))
        small = ["--steps", "3" if "--steps" in arguments else "2"]
        small += ["--pretrain-steps", "2"] if "--pretrain-steps" not in arguments else []
        small += ["--block-size", "42" if "recall" in arguments else "8"] if name == "train_lm" else []
        {"train_lm": train_lm, "train_vit": train_vit}[name].main([*arguments, *tiny, *small])
    assert len(dict.fromkeys(commands)) > 5 and len(list(tmp_path.glob("out/*.svg"))) > 5


def test_the_readmes_example_runs_beside_a_copy_of_seqpe_alone(tmp_path, monkeypatch):
    (tmp_path / "seqpe.py").write_bytes((HERE / "seqpe.py").read_bytes())
    monkeypatch.delitem(sys.modules, "seqpe")
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(EXAMPLE, found := {})
    assert found["attend"].__code__.co_filename == str(tmp_path / "seqpe.py") and found["loss"].isfinite()


class Host(nn.Module):
    """Somebody's GPT: two layers, perhaps with fewer heads of keys; attend is all that knows positions."""

    def __init__(self, vocab_size, example, n_kv_head, C=64, H=2):
        super().__init__()
        self.D, self.example, self.pe = C // H, example, example["pe"]
        self.tokens = nn.Embedding(vocab_size, C)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.ln = nn.ModuleList(nn.LayerNorm(C) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(C, C + 2 * n_kv_head * self.D) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
                                 for _ in range(2))
        self.heads = [H, n_kv_head, n_kv_head]

    def forward(self, idx, positional):
        x = self.tokens(idx)
        for i in range(2):
            heads = self.qkv[i](self.ln[2 * i](x)).unflatten(-1, (-1, self.D)).transpose(1, 2)
            y = self.example["attend"](*heads.split(self.heads, dim=1), *positional)
            x = x + self.proj[i](y.transpose(1, 2).flatten(2))
            x = x + self.mlp[i](self.ln[2 * i + 1](x))
        return self.ln[4](x) @ self.tokens.weight.T


def losses_of_a_host(model, text, steps, T=32):
    """Train as the README says; the loss on the same last T characters of T, 2T, 4T and 8T."""
    train, val = text
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 - 0.9 * step / steps)
        batch = train[torch.randint(len(train) - T, (16, 1)) + torch.arange(T + 1)]
        logits = model(batch[:, :-1], model.example["for_training"](model.pe, 16, T))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + position_regularizers(model.pe.encoder, (T,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses, ends = [], torch.linspace(8 * T + 1, len(val), 128).long().unsqueeze(1)
    for length in (T, 2 * T, 4 * T, 8 * T):
        chars = val[ends + torch.arange(-length - 1, 0)]
        with torch.no_grad():
            logits = model(chars[:, :-1], model.pe(window((length,)))[0].extend)[:, -T:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), chars[:, -T:].flatten()).item())
    return losses


@pytest.mark.parametrize("n_kv_head, alone, steps", [(2, 3, 3), (1, 200, 300)])
def test_the_readmes_example_holds_its_loss_beyond_the_training_length(monkeypatch, n_kv_head, alone, steps):
    """Pasted into a GPT of two layers; with grouped queries it is trained for seconds, else only runs."""
    monkeypatch.syspath_prepend(str(HERE))
    torch.manual_seed(0)
    exec(EXAMPLE.replace("64, 4, 16, 64, 512", "64, 2, 16, 32, 320"), example := {})
    splits = train_lm.read_text("python")
    index = {c: i for i, c in enumerate(sorted(set("".join(splits.values()))))}
    text = [torch.tensor([index[c] for c in splits[name][:10 ** 6]]) for name in ("train", "val")]
    model = Host(len(index), example, n_kv_head)
    pretrain_encoder(model.pe.encoder, (32,), alone)
    shifted = losses_of_a_host(model, text, steps)
    assert all(map(math.isfinite, shifted)) and (steps == 3 or shifted[0] < 2.4), shifted
    assert steps == 3 or shifted[-1] < shifted[0] + 0.03 and max(shifted) < shifted[0] + 0.1, shifted

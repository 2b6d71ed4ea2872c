"""The tests: the arithmetic of seqpe.py against slow loops in float64, its promises and errors; then
train_lm.py as a user runs it, interrupts it and mistypes it; then what the README says.

    pytest test_seqpe.py
"""

import argparse
import ast
import errno
import hashlib
import itertools
import json
import math
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seqpe
import train_lm
import train_vit
from seqpe import (ENCODINGS, FUSIONS, GPT, Attention, Block, GPTConfig, LearnedTable, SeqPE, Signal,
                   Sinusoid, ViT, ViTConfig, contrastive_loss, digits_needed, digits_to_position,
                   distillation_loss, place_windows, position_regularizers, position_to_digits,
                   resize_grid, sample_groups, sample_hard_negatives, window)

BOTH = ["seqpe-scalar", "seqpe-mul", "seqpe-add", "seqpe-input", "rope", "sinusoidal", "learned", "nope"]
TEXT, IMAGE = [*BOTH, "alibi"], [*BOTH, "rope_mixed"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomized(module, seed=0):
    """The module in float64, every parameter moved: biases of 0 and gains of 1 would hide mistakes."""
    generator = seeded(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def weights_of(module):
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def settings_of(encoding):
    """"seqpe-mul" -> pe="seqpe", fusion="mul"."""
    pe, _, fusion = encoding.partition("-")
    return dict(pe=pe, **({"fusion": fusion} if fusion else {}))


def make_encoder(n_dim=1, n_embd=16, n_head=2, n_digits=3, base=5, seed=0, **settings):
    torch.manual_seed(seed)
    return randomized(SeqPE(n_embd, n_head, n_dim=n_dim, n_digits=n_digits, base=base, **settings), seed)


def make_gpt(encoding="seqpe-scalar", seed=0, **settings):
    torch.manual_seed(seed)
    settings = {**dict(n_layer=2, n_head=2, n_embd=16, n_digits=3, block_size=8, vocab_size=11), **settings}
    return randomized(GPT(GPTConfig(**settings_of(encoding), **settings)), seed)


def make_vit(encoding="seqpe-scalar", seed=0, **settings):
    """Trained on 8 by 8 pixels: a grid of 4 by 4 patches."""
    torch.manual_seed(seed)
    settings = {**dict(n_layer=2, n_head=2, n_embd=16, n_digits=2, image_size=8, patch_size=2, n_channels=2,
                       n_classes=5), **settings}
    return randomized(ViT(ViTConfig(**settings_of(encoding), **settings)), seed)


def tokens(*shape, vocab_size=11, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


# ------------------------------------------------------------------------------------------------------------
# Digits


def slow_digits(number, n_digits, base):
    digits = []
    for _ in range(n_digits):
        number, digit = divmod(number, base)
        digits.insert(0, digit)
    return digits


def test_the_example_of_the_paper():
    digits = position_to_digits(torch.tensor([2, 13]), n_digits=2)
    assert digits.tolist() == [0, 2, 1, 3]
    assert digits_to_position(digits, n_digits=2).tolist() == [2, 13]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("base", range(2, 37))
def test_digits_equal_pythons_arithmetic(base, dtype):
    draw = random.Random(base)
    most = max(n for n in range(1, 64) if base ** n <= 2 ** 63)
    for n_dim, lead in itertools.product(range(1, 5), [(), (3,), (2, 1, 2)]):
        n_digits = draw.randint(1, most)
        limit = min(base ** n_digits, torch.iinfo(dtype).max + 1)
        numbers = [draw.choice([0, limit - 1, draw.randrange(limit) >> draw.randrange(63)])  # of every length
                   for _ in range(math.prod(lead) * n_dim)]
        positions = torch.tensor(numbers, dtype=dtype).view(*lead, n_dim)
        digits = position_to_digits(positions, n_digits, base)
        assert digits.shape == (*lead, n_dim * n_digits) and not digits.is_floating_point()
        assert digits.flatten().tolist() == sum((slow_digits(n, n_digits, base) for n in numbers), [])
        back = digits_to_position(digits, n_digits, base)
        assert back.dtype == torch.int64 and back.shape == positions.shape
        assert back.flatten().tolist() == numbers


@pytest.mark.parametrize("base, n_digits", [(2, 63), (3, 39), (8, 21), (10, 18), (36, 12), (10, 1), (2, 1)])
def test_the_largest_position_is_all_highest_digits(base, n_digits):
    largest = torch.tensor([base ** n_digits - 1])
    digits = position_to_digits(largest, n_digits, base)
    assert digits.tolist() == [base - 1] * n_digits
    assert digits_to_position(digits, n_digits, base).equal(largest)


@pytest.mark.parametrize("base, n_digits", [(2, 64), (3, 40), (8, 22), (10, 19), (36, 13)])
def test_more_digits_than_64_bits_hold(base, n_digits):
    for call in (lambda: position_to_digits(torch.tensor([1]), n_digits, base),
                 lambda: digits_to_position(torch.zeros(n_digits, dtype=torch.int64), n_digits, base),
                 lambda: SeqPE(8, n_digits=n_digits, base=base)):
        with pytest.raises(ValueError, match=f"{base}.*{n_digits}.*64-bit"):
            call()


@pytest.mark.parametrize("shape", [(0, 2), (3, 0, 2)])
def test_digits_of_no_positions(shape):
    digits = position_to_digits(torch.zeros(shape, dtype=torch.int64), n_digits=3)
    assert digits.shape == (*shape[:-1], 6)
    assert digits_to_position(digits, n_digits=3).shape == shape


@pytest.mark.parametrize("base", [2, 7, 10, 36])
def test_digits_needed(base):
    for n_digits in range(1, 20):
        assert digits_needed(base ** n_digits - 1, base) == n_digits
        assert digits_needed(base ** n_digits, base) == n_digits + 1
    assert digits_needed(0, base) == 1


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3), (3, 1), (2, 3, 4)])
def test_window_is_row_major(shape):
    slow = list(itertools.product(*map(range, shape)))
    assert list(map(tuple, window(shape).tolist())) == slow


# ------------------------------------------------------------------------------------------------------------
# The sequential encoder


def slow_linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def slow_layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred ** 2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * weights[name + ".weight"] + weights[name + ".bias"]


def exact_gelu(h):
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def tanh_gelu(h):
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))


def slow_block(x, weights, name, n_head, causal, gelu=exact_gelu):
    """A pre-norm layer over one sequence x (T, C), every symbol asking, with the mask written out."""
    T, C = x.shape
    h = slow_layer_norm(x, weights, name + ".ln_1")
    q = slow_linear(h, weights, name + ".attn.query")
    k, v = slow_linear(h, weights, name + ".attn.key_value").split(C, dim=-1)
    mask = torch.tensor([[-math.inf if causal and j > i else 0.0 for j in range(T)] for i in range(T)])
    heads = []
    for channels in torch.arange(C).chunk(n_head):
        logits = q[:, channels] @ k[:, channels].T / math.sqrt(C / n_head) + mask
        weight = logits.exp() / logits.exp().sum(-1, keepdim=True)
        heads.append(weight @ v[:, channels])
    x = x + slow_linear(torch.cat(heads, dim=-1), weights, name + ".attn.proj")
    h = slow_linear(slow_layer_norm(x, weights, name + ".ln_2"), weights, name + ".mlp.0")
    return x + slow_linear(gelu(h), weights, name + ".mlp.2")


def slow_encoder(encoder, position):
    """e_p of one position, a tuple of Python integers: the paper's arithmetic, all symbols in every layer."""
    weights, rows = weights_of(encoder), []
    for dimension, number in enumerate(position):
        for place, digit in enumerate(slow_digits(number, encoder.n_digits, encoder.base)):
            row = weights["symbol.weight"][digit] + weights["place.weight"][place]
            rows.append(row + weights["dimension.weight"][dimension] if len(position) > 1 else row)
    x = torch.stack([*rows, weights["cls"]])
    for layer in range(len(encoder.blocks)):
        x = slow_block(x, weights, f"blocks.{layer}", encoder.n_head, True, tanh_gelu)
    heads = slow_linear(slow_layer_norm(x, weights, "ln")[-1], weights, "proj").chunk(encoder.n_head)
    return torch.cat([head / (head ** 2).sum().sqrt() * math.sqrt(32) for head in heads])


@pytest.mark.parametrize("n_dim, n_layer, base, n_digits", [(1, 1, 10, 4), (1, 2, 10, 4), (1, 3, 2, 9),
                                                            (2, 2, 10, 2), (3, 2, 4, 2)])
def test_encoder_is_the_papers_transformer(n_dim, n_layer, base, n_digits):
    encoder = make_encoder(n_dim, n_layer=n_layer, base=base, n_digits=n_digits)
    positions = torch.randint(base ** n_digits, (12, n_dim), generator=seeded())
    slow = torch.stack([slow_encoder(encoder, position) for position in positions.tolist()])
    torch.testing.assert_close(encoder(positions), slow, rtol=0, atol=1e-10)
    assert slow.std(0).min() > 1e-3     # the positions do tell in every channel


@pytest.mark.parametrize("n_dim", [1, 2, 3])
def test_encoding_a_batch_is_encoding_one_by_one(n_dim):
    encoder = make_encoder(n_dim)
    positions = torch.randint(125, (2, 7, n_dim), generator=seeded())
    together = encoder(positions)
    assert together.shape == (2, 7, 16)
    for b, t in itertools.product(range(2), range(7)):
        torch.testing.assert_close(together[b, t], encoder(positions[b, t]).view(16))


def test_one_dimension_needs_no_dimension():
    encoder = make_encoder()
    plain = torch.arange(10)
    e = encoder(plain)
    assert e.shape == (10, 16)
    assert encoder(plain.unsqueeze(-1)).equal(e)
    assert encoder(plain.view(2, 5)).shape == (2, 5, 16)
    assert encoder(plain.view(2, 5, 1)).equal(encoder(plain.view(2, 5)))
    torch.testing.assert_close(encoder(plain.view(2, 5)).flatten(0, 1), e)
    assert encoder(plain.to(torch.uint8)).equal(e)
    assert encoder(plain.view(10, 1, 1)).shape == (10, 1, 16)


@pytest.mark.parametrize("n_dim", [1, 2])
def test_encoding_no_positions(n_dim):
    """Generation from a prompt of one token by no token encodes an empty window."""
    assert make_encoder(n_dim)(torch.zeros(0, n_dim, dtype=torch.int64)).shape == (0, 16)


@pytest.mark.parametrize("n_dim, base, n_digits", [(1, 3, 4), (2, 3, 2), (3, 2, 2)])
def test_every_position_is_told_apart(n_dim, base, n_digits):
    torch.manual_seed(0)
    encoder = SeqPE(16, 2, n_dim=n_dim, base=base, n_digits=n_digits)      # as it starts, small weights
    e = encoder(window((base ** n_digits,) * n_dim))
    assert len(e) == base ** (n_digits * n_dim)
    assert F.pdist(e.double()).min() > 1e-4


def test_the_order_of_the_coordinates_matters():
    encoder = make_encoder(n_dim=2)
    a = encoder(torch.tensor([[2, 13], [0, 1], [124, 0]]))
    b = encoder(torch.tensor([[13, 2], [1, 0], [0, 124]]))
    assert ((a - b).norm(dim=-1) > 0.01).all()


@pytest.mark.parametrize("n_dim", [1, 2])
def test_gradients_reach_every_parameter_of_the_encoder(n_dim):
    encoder = make_encoder(n_dim, base=5, n_digits=2)
    positions = torch.randint(25, (40, n_dim), generator=seeded())
    (encoder(positions) * randn(40, 16)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0.9 * parameter.numel(), name


def test_encoder_in_float32_and_float64_agree():
    encoder = make_encoder()
    positions = torch.arange(125)
    exact = encoder(positions)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(encoder.float()(positions), exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_embd, n_head, width", [(16, 4, None), (20, 4, None), (12, 3, 6), (8, 2, 32)])
def test_the_encoder_may_have_a_width_of_its_own(n_embd, n_head, width):
    torch.manual_seed(0)
    encoder = SeqPE(n_embd, n_head, width=width)
    assert encoder(torch.arange(3)).shape == (3, n_embd)
    assert encoder.max_position == 10000
    if width:
        assert encoder.symbol.weight.shape == (10, width)


# ------------------------------------------------------------------------------------------------------------
# The two regularisers


def single_edits(digits, base):
    """Every (kind, result) of one edit of a tuple of digits, as often as it can be drawn."""
    for at in range(len(digits)):
        for new in range(base):
            yield "insert", (*digits[1:at + 1], new, *digits[at + 1:])
            yield "replace", (*digits[:at], new, *digits[at + 1:])
            yield "delete", (0, *digits[:at], *digits[at + 1:])
            swapped = digits if at + 1 == len(digits) else \
                (*digits[:at], digits[at + 1], digits[at], *digits[at + 2:])
            yield "swap", swapped


def as_digits(positions, n_digits, base):
    return [sum((tuple(slow_digits(number, n_digits, base)) for number in position), ())
            for position in positions.tolist()]


@pytest.mark.parametrize("n_dim, n_digits, pivot", [(1, 7, [12345]), (2, 3, [38, 109]), (1, 1, [3])])
def test_hard_negatives_are_one_to_three_edits_away(n_dim, n_digits, pivot):
    base, n_samples = 5, 60000
    pivots = torch.tensor([pivot])
    found = sample_hard_negatives(pivots, n_samples, n_digits, base, seeded())
    assert found.shape == (1, n_samples, n_dim)
    found = Counter(as_digits(found[0], n_digits, base))

    start = as_digits(pivots, n_digits, base)[0]
    reached = [{start}]     # after 0, 1, 2, 3 edits
    for _ in range(3):
        reached.append({result for digits in reached[-1] for _, result in single_edits(digits, base)})
    assert set(found) <= reached[3]
    if n_digits > 1:
        assert len(reached[3]) < 0.6 * base ** len(start)    # or it would be no news
        for fewer, more in zip(reached, reached[1:]):
            assert set(found) & (more - fewer)
    # A third are edited once, each edit as likely as any other; more edits can only add to these counts.
    once = Counter(single_edits(start, base))
    assert {kind for kind, _ in once} == {"insert", "replace", "delete", "swap"}
    for (kind, result), ways in once.items():
        assert found[result] > 0.6 * n_samples / 3 * ways / once.total(), kind


def test_each_pivot_gets_its_own_hard_negatives():
    base, n_digits = 10, 6
    pivots = torch.randint(base ** n_digits, (20, 1), generator=seeded())
    found = sample_hard_negatives(pivots, 300, n_digits, base, seeded(1))
    assert found.shape == (20, 300, 1)
    for pivot, negatives in zip(as_digits(pivots, n_digits, base), found):
        near = {result for _, result in single_edits(pivot, base)}
        assert sum(digits in near for digits in as_digits(negatives, n_digits, base)) > 300 / 4


@pytest.mark.parametrize("base, n_digits", [(2, 1), (3, 2), (10, 4)])
@pytest.mark.parametrize("n_dim, n_candidates", [(1, 1), (1, 32), (2, 2), (3, 32)])
def test_candidates_can_be_written_and_are_not_the_pivot(n_dim, n_candidates, base, n_digits):
    for mix in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.1, 0.7)):
        groups = sample_groups(200, n_candidates, n_dim, n_digits, base, mix, generator=seeded())
        assert groups.shape == (200, 1 + n_candidates, n_dim) and groups.dtype == torch.int64
        assert 0 <= groups.min() and groups.max() < base ** n_digits
        assert not (groups[:, 1:] == groups[:, :1]).all(-1).any()


def test_each_way_draws_what_it_says():
    def draw(*mix, n_digits=4):
        return sample_groups(3000, 32, 1, n_digits, mix=mix, generator=seeded()).squeeze(-1)

    uniform = draw(1, 0, 0)
    assert uniform.min() < 20 and uniform.max() > 9979 and 4900 < uniform.double().mean() < 5100

    hard = draw(0, 1, 0, n_digits=7)[:100]
    near = [{result for _, result in single_edits(written, 10)} for written in as_digits(hard[:, :1], 7, 10)]
    hits = [sum(digits in near[i] for digits in as_digits(row[:, None], 7, 10)) for i, row in enumerate(hard)]
    assert max(hits) <= 7 and sum(map(bool, hits)) > 80     # a fifth of 32, a third of it one edit away

    close = draw(0, 0, 1)
    extent = close[:, 1:].amax(1) - close[:, 1:].amin(1)
    for size, share in ((64, 0.6), (1000, 0.84), (10000, 1.0)):     # sqrt(log(size / 4) / log(10000 / 4))
        assert (extent <= size).double().mean() == pytest.approx(share, abs=0.06)
    inside = (close[:, :1] >= close[:, 1:].amin(1, keepdim=True) - extent[:, None] / 4 - 3)
    assert inside.double().mean() > 0.99        # the window is around the pivot, which may be anywhere in it
    below = (close[:, 1:] < close[:, :1]).double().mean()
    assert 0.45 < below < 0.55

    mixed = sample_groups(3000, 32, 1, 4, mix=(0.2, 0.1, 0.7), generator=seeded()).squeeze(-1)
    extent = mixed[:, 1:].amax(1) - mixed[:, 1:].amin(1)
    assert (extent <= 64).double().mean() == pytest.approx(0.7 * 0.6, abs=0.04)


@pytest.mark.parametrize("shape", [(16,), (3, 4), (2, 3, 2)])
def test_windows_are_moved_as_a_whole(shape):
    max_position = 20
    windows = place_windows(shape, 300, max_position, generator=seeded())
    assert windows.shape == (300, math.prod(shape), len(shape))
    start = windows - window(shape)
    assert (start == start[:, :1]).all()                            # one translation for each window
    assert start.amin((0, 1)).tolist() == [0] * len(shape)          # from the first place the window fits ...
    assert start.amax((0, 1)).tolist() == [max_position - size for size in shape]   # ... to the last
    if len(shape) > 1:
        assert not (start[:, 0, 0] == start[:, 0, 1]).all()


@pytest.mark.parametrize("shape", [(16,), (6, 8)])
@pytest.mark.parametrize("n_pieces", [2, 4])
def test_windows_come_in_pieces(shape, n_pieces):
    """Along each axis the offset is a staircase: up to n_pieces values, none below the one before."""
    windows = place_windows(shape, 400, 1000, n_pieces, generator=seeded())
    assert windows.min() == 0 and windows.max() > 990
    gaps = []
    for axis, size in enumerate(shape):
        places = window(shape)[:, axis]
        found = Counter()
        for offset in (windows - window(shape))[..., axis]:
            by_place = [offset[places == place].unique().tolist() for place in range(size)]
            assert all(len(values) == 1 for values in by_place)
            stairs = [value for (value,) in by_place]
            assert stairs == sorted(stairs)
            found[len(set(stairs))] += 1
            gaps += [after - before for before, after in itertools.pairwise(stairs) if after > before]
        assert set(found) == set(range(1, n_pieces + 1)) and found[n_pieces] > 0.25 * found.total()
    assert max(gaps) > 800


def test_a_window_as_large_as_all_positions():
    for n_pieces in (1, 3):
        windows = place_windows((9, 9), 3, 9, n_pieces, generator=seeded())
        assert all(each.equal(window((9, 9))) for each in windows)


SAMPLERS = {
    "hard negatives": lambda g: [sample_hard_negatives(torch.tensor([[123], [4567]]), 9, 4, generator=g)],
    "candidates": lambda g: [sample_groups(5, 7, 2, 3, generator=g)],
    "windows": lambda g: [place_windows((8, 8), 3, 1000, 2, generator=g)],
    "regularisers": lambda g: [position_regularizers(make_encoder(), (20,), generator=g)],
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_generator_decides_everything(name):
    first, again, other = (SAMPLERS[name](seeded(seed)) for seed in (3, 3, 4))
    assert all(a.equal(b) for a, b in zip(first, again))
    assert not any(a.equal(b) for a, b in zip(first, other))


@pytest.mark.parametrize("name", ["hard negatives", "candidates", "windows"])
def test_a_generator_leaves_torchs_own_alone(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    SAMPLERS[name](seeded())
    assert torch.get_rng_state().equal(state)
    SAMPLERS[name](None)
    assert not torch.get_rng_state().equal(state)


def slow_contrastive_loss(e, positions, n_head):
    losses = []
    for e_group, group in zip(e, positions.tolist()):
        for i, pivot in enumerate(group):
            others = [j for j, position in enumerate(group) if position != pivot]
            distances = [sum((a - b) ** 2 for a, b in zip(group[j], pivot)) for j in others]
            nearest = others[distances.index(min(distances))]
            ties = {j for j, distance in zip(others, distances) if distance == min(distances)} - {nearest}
            others = [j for j in others if j not in ties]
            for e_head in e_group.chunk(n_head, dim=-1):
                logits = {j: float(e_head[i] @ e_head[j]) for j in others}
                losses.append(math.log(sum(map(math.exp, logits.values()))) - logits[nearest])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("n_dim, highest, n_head", [(1, 12, 1), (1, 12, 3), (2, 4, 2), (3, 3, 1),
                                                    (1, 10**9, 2), (3, 10**9, 1)])
def test_contrastive_loss_equals_a_loop(n_dim, highest, n_head):
    positions = torch.randint(highest, (6, 15, n_dim), generator=seeded())
    if highest > 100:       # rivals that only exact integers tell apart
        positions = 9 * 10 ** 8 - positions % 100
        positions[:, ::2] %= 100
    else:
        assert len(positions[0].unique(dim=0)) < 15       # with copies of a position
    e = randn(6, 15, 6).requires_grad_()
    loss = contrastive_loss(e, positions, n_head)
    slow = slow_contrastive_loss(e.detach(), positions, n_head)
    assert loss.shape == () and loss.item() == pytest.approx(slow, abs=1e-12)
    loss.backward()
    assert e.grad.isfinite().all() and (e.grad.flatten(0, 1).norm(dim=1) > 0).all()


def test_contrastive_loss_of_two_places_and_copies_is_zero():
    positions = torch.tensor([[[0], [5], [5], [0], [0]]])
    assert contrastive_loss(randn(1, 5, 4), positions) == 0


def test_contrastive_loss_rewards_embeddings_in_order():
    groups = sample_groups(64, 16, 1, 2, generator=seeded())
    angle = torch.arange(100) * math.pi / 100
    ordered = 5 * torch.stack([angle.cos(), angle.sin()], dim=-1)     # the dot product falls with distance
    shuffled = ordered[torch.randperm(100, generator=seeded())]
    good, bad = (contrastive_loss(e[groups.squeeze(-1)], groups) for e in (ordered, shuffled))
    assert good < 0.7 * bad


def slow_distillation_loss(e_teacher, e_students, n_head):
    losses = []
    for student in e_students:
        for channels in torch.arange(e_teacher.size(-1)).chunk(n_head):
            t, s = (F.log_softmax(e[:, channels] @ e[:, channels].T, dim=-1) for e in (e_teacher, student))
            for row in range(len(t)):
                losses.append(F.kl_div(s[row], t[row], reduction="sum", log_target=True)
                              + F.kl_div(t[row], s[row], reduction="sum", log_target=True))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("n_head", [1, 2, 4])
@pytest.mark.parametrize("m, n_students", [(7, 3), (2, 1)])
def test_distillation_loss_equals_a_loop(n_head, m, n_students):
    e_teacher, e_students = randn(m, 8), randn(n_students, m, 8, seed=1)
    loss = distillation_loss(e_teacher, e_students, n_head)
    assert loss.shape == () and loss > 1e-3
    torch.testing.assert_close(loss, slow_distillation_loss(e_teacher, e_students, n_head))


def test_distillation_loss_is_zero_for_the_teachers_own_geometry():
    e_teacher = randn(7, 8)
    assert distillation_loss(e_teacher, e_teacher.expand(3, -1, -1), 2).abs() < 1e-12
    # Turned within each head the dot products stay; turned across heads they do not.
    turn = [torch.linalg.qr(randn(4, 4, seed=seed))[0] for seed in (1, 2)]
    within, across = torch.block_diag(*turn), torch.linalg.qr(randn(8, 8, seed=3))[0]
    assert distillation_loss(e_teacher, (e_teacher @ within)[None], 2).abs() < 1e-12
    assert distillation_loss(e_teacher, (e_teacher @ across)[None], 2) > 0.01
    e_student = randn(1, 7, 8, seed=4)
    torch.testing.assert_close(distillation_loss(e_teacher, e_student @ within, 2),
                               distillation_loss(e_teacher, e_student, 2))


def test_distillation_loss_teaches_only_the_students():
    e_teacher, e_students = randn(7, 8).requires_grad_(), randn(3, 7, 8, seed=1).requires_grad_()
    distillation_loss(e_teacher, e_students, 2).backward()
    assert e_teacher.grad is None
    assert e_students.grad.isfinite().all() and e_students.grad.count_nonzero() == e_students.numel()


@pytest.mark.parametrize("shape", [(20,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("near_weight, far_weight", [(0.1, 0.1), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_position_regularizers_are_the_two_losses(shape, near_weight, far_weight):
    encoder = make_encoder(len(shape))
    loss = position_regularizers(encoder, shape, near_weight, far_weight, n_groups=6, n_candidates=9,
                                 n_students=2, n_samples=8, generator=seeded(7))
    generator, slow = seeded(7), 0.0
    if near_weight:
        groups = sample_groups(6, 9, len(shape), 3, 5, generator=generator)
        slow += near_weight * contrastive_loss(encoder(groups), groups, encoder.n_head)
    if far_weight:
        students = place_windows(shape, 2, 125, generator=generator)
        chosen = torch.randperm(math.prod(shape), generator=generator)[:8]
        assert len(chosen) == 8
        slow += far_weight * distillation_loss(encoder(window(shape)[chosen]), encoder(students[:, chosen]),
                                               encoder.n_head)
    torch.testing.assert_close(loss, slow)
    loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0, name


def test_position_regularizers_of_weight_zero():
    encoder = make_encoder()
    calls = []
    encoder.symbol.register_forward_hook(lambda *_: calls.append(1))
    assert position_regularizers(encoder, (20,), 0, 0) == 0 and not calls
    assert position_regularizers(encoder, (20,), 0, 1, generator=seeded()) > 0
    assert len(calls) == 1
    # A contrastive part that is off does not ask for distances, which here would overflow.
    huge = make_encoder(base=10, n_digits=18)
    assert position_regularizers(huge, (20,), 0, 1, generator=seeded()) > 0


@pytest.mark.parametrize("shape", [(16,), (4, 4), (2, 2, 4)])
def test_training_lowers_the_regularisers(shape):
    torch.manual_seed(0)
    encoder = SeqPE(16, 2, n_dim=len(shape), n_digits=2, base=5, width=16)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):    # on the same positions: fresh ones would take longer
        loss = position_regularizers(encoder, shape, 1, 1, n_groups=4, n_candidates=8, n_students=2,
                                     n_samples=8, generator=seeded(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-25:]) / 25 < 0.75 * losses[0]


# ------------------------------------------------------------------------------------------------------------
# Attention and the encodings


def slow_attention(attn, x, logit):
    """Attention.forward with logit(head, q_i, k_j, i, j) for each pair, one (T, T) matrix a head."""
    weights, (B, T, C) = weights_of(attn), x.shape
    sequences = []
    for b in range(B):
        q, k_v = slow_linear(x[b], weights, "query"), slow_linear(x[b], weights, "key_value")
        k, v = k_v[:, :C], k_v[:, C:]
        heads = []
        for h, channels in enumerate(torch.arange(C).chunk(attn.n_head)):
            logits = torch.full((T, T), -math.inf, dtype=torch.float64)
            for i, j in itertools.product(range(T), repeat=2):
                if j <= i or not attn.causal:
                    logits[i, j] = logit(h, q[i, channels], k[j, channels], i, j)
            heads.append(logits.softmax(-1) @ v[:, channels])
        sequences.append(slow_linear(torch.cat(heads, dim=-1), weights, "proj"))
    return torch.stack(sequences)


def check_attention(model, positions, logit_of_layer, atol=1e-10):
    """Every layer's attention under the model's own signals; the class token's row, if any, is cut off."""
    cut = int(model.pe.class_token)
    x = randn(2, len(positions), model.config.n_embd, seed=3)
    signals = model.pe(positions)
    assert len(signals) == len(model.blocks)
    for layer, (block, signal) in enumerate(zip(model.blocks, signals)):
        slow = slow_attention(block.attn, x, logit_of_layer(layer))
        fast = block.attn(x, signal.at(slice(cut, cut + len(positions))))
        torch.testing.assert_close(fast, slow, rtol=0, atol=atol)
        plain = block.attn(x)
        assert (fast - plain).abs().max() > 0.01 or model.config.pe == "nope"     # the encoding has a say


SOME = torch.tensor([[0], [3], [4], [9], [250], [260], [700]])
GRID = torch.tensor([[0, 0], [0, 3], [2, 1], [7, 5], [3, 9]])


def test_attention_without_a_signal():
    check_attention(make_gpt("nope"), SOME, lambda layer: lambda h, q, k, i, j: q @ k / math.sqrt(8))
    check_attention(make_vit("nope"), GRID, lambda layer: lambda h, q, k, i, j: q @ k / math.sqrt(8))


@pytest.mark.parametrize("n_head", [2, 4, 8])
def test_alibi_is_a_bias_that_falls_with_distance(n_head):
    def logit_of_layer(layer):
        def logit(h, q, k, i, j):
            slope = 2 ** (-8 * (h + 1) / n_head)
            return q @ k / math.sqrt(16 / n_head) - slope * float(SOME[i] - SOME[j])
        return logit

    check_attention(make_gpt("alibi", n_head=n_head), SOME, logit_of_layer, atol=1e-4)    # slopes in float32


def test_alibi_is_exact_in_bfloat16():
    j = make_gpt("alibi").float().pe(window((60000,)))[0].extend[1]
    assert j.bfloat16().double().sum(-1).equal(torch.arange(60000.0).double().expand(2, -1))


def slow_e(model, positions):
    return torch.stack([slow_encoder(model.encoder, position) for position in positions.tolist()])


@pytest.mark.parametrize("make, positions", [(make_gpt, SOME), (make_vit, GRID)], ids=["GPT", "ViT"])
@pytest.mark.parametrize("fusion", ["scalar", "mul", "add"])
def test_seqpe_enters_attention_as_the_paper_writes(make, positions, fusion):
    model = make(f"seqpe-{fusion}")
    e = slow_e(model, positions)
    assert len(model.pe.maps) == (1 if fusion == "scalar" and make is make_gpt else 2)

    def logit_of_layer(layer):
        W = model.pe.maps[layer % len(model.pe.maps)].weight.detach()

        def logit(h, q, k, i, j):
            e_q, e_k = (W @ e[end] for W, end in zip(W.chunk(2), (i, j)))
            e_q, e_k = e_q.chunk(2)[h], e_k.chunk(2)[h]
            return {"scalar": lambda: q @ k + e_q @ e_k, "mul": lambda: (q * e_q) @ (k * e_k),
                    "add": lambda: (q + e_q) @ (k + e_k)}[fusion]() / math.sqrt(8)
        return logit

    check_attention(model, positions, logit_of_layer)


@pytest.mark.parametrize("spread, slopes", [(0, [1, 1]), (8, [1, 1 / 16])])
@pytest.mark.parametrize("fusion, n_maps", [("scalar", 1), ("mul", 3), ("add", 3), ("input", 0)])
def test_the_maps_start_as_slopes_times_the_dot_product(fusion, n_maps, spread, slopes):
    torch.manual_seed(0)
    pe = GPT(GPTConfig(n_layer=3, n_embd=16, n_head=2, pe="seqpe", fusion=fusion, spread=spread)).pe
    assert len(pe.maps) == n_maps and all(each.bias is None for each in pe.maps)
    e = pe.embedding(torch.arange(5))
    for each in pe.maps:
        for head, slope in enumerate(slopes):
            e_h = e.chunk(2, dim=-1)[head]
            eq, ek = (part.chunk(2, dim=-1)[head] for part in each(e).chunk(2, dim=-1))
            torch.testing.assert_close(eq @ ek.T / math.sqrt(8), slope * e_h @ e_h.T)


@pytest.mark.parametrize("n_dim", [1, 2])
def test_every_embedding_has_the_same_length_in_every_head(n_dim):
    encoder = make_encoder(n_dim)
    positions = torch.randint(encoder.max_position, (50, n_dim), generator=seeded())
    heads = encoder(positions).unflatten(-1, (encoder.n_head, -1))
    torch.testing.assert_close(heads.pow(2).sum(-1), torch.full_like(heads[..., 0], 32))


def turned(x, angles):
    """RoPE as it is written: a 2 by 2 rotation matrix for the pair of channels (c, c + D/2)."""
    x, half = x.clone(), len(x) // 2
    for c, angle in enumerate(angles):
        matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        x[[c, c + half]] = matrix.double() @ x[[c, c + half]]
    return x


@pytest.mark.parametrize("pe, make, positions", [("rope", make_gpt, SOME), ("rope", make_vit, GRID),
                                                 ("rope_mixed", make_vit, GRID)])
def test_rope_turns_queries_and_keys(pe, make, positions):
    model = make(pe)

    def angles(layer, head, position):
        if pe == "rope_mixed":      # pair c looks at both coordinates, with its own learned frequencies
            frequency = model.pe.frequency[layer, head].tolist()
            return [sum(frequency[d][c] * p for d, p in enumerate(position)) for c in range(4)]
        if len(position) == 1:
            return [position[0] * 10000 ** (-c / 4) for c in range(4)]
        return [p * 100 ** (-c / 2) for p in position for c in range(2)]    # half of the pairs for each

    def logit_of_layer(layer):
        def logit(h, q, k, i, j):
            p_i, p_j = positions[i].tolist(), positions[j].tolist()
            return turned(q, angles(layer, h, p_i)) @ turned(k, angles(layer, h, p_j)) / math.sqrt(8)
        return logit

    check_attention(model, positions, logit_of_layer, atol=2e-4)   # frequencies are kept in float32


def test_mixed_rope_starts_with_two_axes_at_right_angles():
    torch.manual_seed(0)
    frequency = ViT(ViTConfig(n_layer=2, n_head=3, n_embd=24, pe="rope_mixed")).pe.frequency.detach()
    assert frequency.shape == (2, 3, 2, 4) and len(frequency[..., 0].flatten(0, 1).unique(dim=0)) == 6
    magnitude = torch.tensor([1, 0.1, 1, 0.1]).expand(2, 3, -1)
    torch.testing.assert_close(frequency.norm(dim=2), magnitude)
    assert (frequency[..., 0] * frequency[..., 2]).sum(-1).abs().max() < 1e-6


def test_the_learned_table_and_the_sinusoid():
    model = make_gpt("learned")
    signals = model.pe(torch.tensor([[5], [0], [7]]))
    assert signals[0].input.equal(model.pe.embedding.weight[[5, 0, 7]])
    assert signals[1:] == [Signal()]

    torch.manual_seed(0)
    table = LearnedTable((3, 4), 6)
    e = table(torch.tensor([[[2, 1], [0, 3]]]))
    assert e.shape == (1, 2, 6) and e[0, 0].equal(table.weight[2, 1]) and e[0, 1].equal(table.weight[0, 3])

    e = Sinusoid(2, 16)(torch.tensor([[3, 50]]))[0]
    slow = [wave(p * 10000 ** (-c / 4)) for p in (3, 50) for wave in (math.sin, math.cos) for c in range(4)]
    torch.testing.assert_close(e, 0.1 * torch.tensor(slow), rtol=0, atol=1e-5)      # the gain's start


@pytest.mark.parametrize("encoding", ["seqpe-input", "sinusoidal", "learned"])
@pytest.mark.parametrize("make, shape", [(make_gpt, (8,)), (make_vit, (4, 4))], ids=["GPT", "ViT"])
def test_input_encodings_are_added_once(encoding, make, shape):
    model = make(encoding)
    first, second = model.pe(window(shape))
    assert second == Signal() and first == Signal(input=first.input)
    cls = [] if model.pe.cls is None else [model.pe.cls[None]]
    assert first.input.equal(torch.cat([*cls, model.pe.embedding(window(shape))]))
    x = randn(2, len(first.input), 16)
    torch.testing.assert_close(model.blocks[0](x, first), model.blocks[0](x + first.input))


@pytest.mark.parametrize("pe", ["rope", "rope_mixed"])
def test_rope_on_a_grid_sees_only_differences(pe):
    model = make_vit(pe)
    x = randn(2, len(GRID), 16)
    for layer, block in enumerate(model.blocks):
        here, moved, mirrored = (block.attn(x, model.pe(positions)[layer].at(slice(1, None)))
                                 for positions in (GRID, GRID + torch.tensor([5, 30]), GRID.flip(-1)))
        torch.testing.assert_close(here, moved, rtol=0, atol=1e-4)
        assert (here - mirrored).abs().max() > 0.01


@pytest.mark.parametrize("encoding", TEXT)
def test_signal_at(encoding):
    model = make_gpt(encoding)
    for whole, part in zip(model.pe(window((8,))), model.pe(window((8,))[3:7])):
        for a, b in zip(whole.at(slice(3, 7)), part):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_only_the_last_token_may_ask(causal):
    torch.manual_seed(0)
    block = randomized(Block(16, 2, causal=causal))
    x = randn(3, 6, 16)
    torch.testing.assert_close(block(x, last_only=True), block(x)[:, -1:])


@pytest.mark.parametrize("pieces", [(6,), (1, 1, 1, 1, 1, 1), (4, 1, 1)])
def test_attention_goes_on_from_its_cache(pieces):
    torch.manual_seed(0)
    attn = randomized(Attention(16, 2))
    x, cache = randn(3, 6, 16), {}
    y = torch.cat([attn(piece, cache=cache) for piece in x.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(y, attn(x))
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        attn(x[:, :2], cache=cache)


@pytest.mark.parametrize("encoding", TEXT)
def test_attention_is_the_fused_kernel_with_no_mask(encoding, monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **settings):
        calls.append((attn_mask, is_causal, q.size(-1), k.size(-1), v.size(-1)))
        return kernel(q, k, v, attn_mask, dropout_p, is_causal, **settings)

    model = make_gpt(encoding)
    signals = model.pe(window((8,)))    # the encoder attends too, but that is not the point here
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model.transform(randn(2, 8, 16), signals)
    width = {"seqpe-scalar": 8 + 4, "alibi": 8 + 2}.get(encoding, 8)
    assert calls == [(None, True, width, width, width)] * 2    # the CPU's kernel wants one width


def test_no_matrix_of_all_pairs_is_built():
    T, seen = 512, []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
            seen.extend((str(function), tuple(tensor.shape)) for tensor in tensors)
            return result

    for encoding in ("seqpe-scalar", "alibi"):
        model = make_gpt(encoding, n_layer=1, block_size=T).float()
        idx = tokens(2, T)
        seen.clear()
        with Recorder():
            _, loss = model(idx, targets=idx)
            loss.backward()
        assert any("attention" in name and "backward" in name for name, _ in seen)
        for name, shape in seen:
            assert shape.count(T) < 2 and math.prod(shape) < T * T, (name, shape)

    seen.clear()        # and it would have been noticed
    with Recorder():
        attn = model.blocks[0].attn
        slow = torch.zeros(T, 8) @ torch.zeros(T, 8).T
        attn(torch.zeros(1, T, 16))
    assert slow.shape in [shape for _, shape in seen]


def stretched(values, new):
    """(old, C) -> (new, C): output p lies at (p + 0.5) * old / new - 0.5 of the input, or at its end."""
    old, rows = len(values), []
    for p in range(new):
        at = min(max((p + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(at), old - 2)
        rows.append(values[low] * (low + 1 - at) + values[low + 1] * (at - low))
    return torch.stack(rows)


@pytest.mark.parametrize("old, new", [(8, 16), (8, 24), (8, 13), (8, 5), (8, 8)])
def test_text_is_stretched_linearly(old, new):
    values = randn(old, 3)
    torch.testing.assert_close(resize_grid(values, ((old,), (new,))), stretched(values, new))


@pytest.mark.parametrize("encoding", TEXT)
def test_text_encodings_are_stretched(encoding):
    model = make_gpt(encoding)
    signal = model.pe(window((8,)), resize=((8,), (16,)))[0]
    places = stretched(torch.arange(8.0).double().unsqueeze(-1), 16)     # 0, 0.25, 0.75, ... 6.75, 7
    assert places[1:15].flatten().tolist() == [(p + 0.5) / 2 - 0.5 for p in range(1, 15)]
    if encoding == "nope":
        assert signal == Signal()
    elif encoding == "rope":
        angle = places * 10000 ** (-torch.arange(4) / 4)
        torch.testing.assert_close(signal.rotate, torch.stack([angle.cos(), angle.sin()])[:, None].double(),
                                   rtol=0, atol=1e-5)
    elif encoding == "alibi":
        j = signal.extend[1].sum(-1).double()
        torch.testing.assert_close(j, places.T.expand(2, -1), rtol=0, atol=1e-5)
    else:
        e = stretched(model.pe.embedding(window((8,))), 16)
        if encoding in ("seqpe-input", "sinusoidal", "learned"):
            torch.testing.assert_close(signal.input.double(), e, rtol=0, atol=1e-6)
        else:
            e = model.pe.maps[0](e).view(16, 2, 2, -1).permute(1, 2, 0, 3)
            torch.testing.assert_close(getattr(signal, FUSIONS[encoding.partition("-")[2]]), e)


@pytest.mark.parametrize("encoding", ["seqpe-input", "sinusoidal", "learned"])
@pytest.mark.parametrize("new", [(8, 8), (6, 9), (4, 4), (2, 3)])
def test_a_grid_is_stretched_by_bicubic_interpolation(encoding, new):
    model = make_vit(encoding)
    e = model.pe.embedding(window((4, 4)))
    grid = torch.stack([e[4 * row:4 * row + 4] for row in range(4)])                    # (4, 4, C)
    slow = F.interpolate(grid.permute(2, 0, 1)[None], size=new, mode="bicubic", align_corners=False)[0]
    signal = model.pe(window((4, 4)), resize=((4, 4), new))[0].input
    assert signal[0].equal(model.pe.cls)
    torch.testing.assert_close(signal[1:], torch.stack([slow[:, y, x] for y, x in window(new).tolist()]))


@pytest.mark.parametrize("pe", ["rope", "rope_mixed"])
def test_rope_is_stretched_over_fractional_positions(pe):
    model = make_vit(pe)
    signals = model.pe(window((4, 4)), resize=((4, 4), (8, 12)))
    line = torch.arange(4.0).double()
    places = torch.cartesian_prod(*(stretched(line[:, None], size)[:, 0] for size in (8, 12)))      # (T, 2)
    frequency = model.pe.frequency.expand(2, -1, -1, -1)
    for layer, signal in enumerate(signals):
        angle = places @ frequency[layer].double()              # (1 or H, T, D/2)
        torch.testing.assert_close(signal.rotate[..., 1:, :].double(),
                                   torch.stack([angle.cos(), angle.sin()]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make, encoding, shape", [*((make_gpt, encoding, (8,)) for encoding in TEXT),
                                                   *((make_vit, encoding, (4, 4)) for encoding in IMAGE)])
def test_stretching_to_the_training_size_changes_nothing(make, encoding, shape):
    model = make(encoding)
    for plain, stretch in zip(model.pe(window(shape)), model.pe(window(shape), resize=(shape, shape))):
        for a, b in zip(plain, stretch):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=0, atol=1e-6)


def test_rope_keeps_its_angles_under_autocast():
    model = make_gpt("rope").float()
    exact = model.pe(SOME)[0].rotate
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.pe(SOME)[0].rotate, exact)


# ------------------------------------------------------------------------------------------------------------
# GPT


def test_gpt_is_the_plain_transformer():
    model = make_gpt("nope")
    idx, weights = tokens(2, 7), weights_of(model)
    logits, loss = model(idx)
    assert loss is None and logits.shape == (2, 7, 11)
    for row, sequence in zip(logits, idx):
        x = weights["tokens.weight"][sequence]
        for layer in range(2):
            x = slow_block(x, weights, f"blocks.{layer}", 2, causal=True)
        slow = slow_layer_norm(x, weights, "ln") @ weights["tokens.weight"].T     # tied weights
        torch.testing.assert_close(row, slow)


def test_weights_start_as_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=64, vocab_size=100, pe="nope"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1 if "ln" in name and "weight" in name else 0)).all(), name
        else:
            into_stream = name.endswith(("attn.proj.weight", "mlp.2.weight"))     # 0.02 / sqrt(2 n_layer)
            std = parameter.detach().std().item()
            assert std == pytest.approx(0.005 if into_stream else 0.02, rel=0.05), name
    _, loss = model(tokens(4, 32, vocab_size=100), tokens(4, 32, vocab_size=100, seed=1))
    assert loss.item() == pytest.approx(math.log(100), abs=0.1)


def test_loss_is_the_mean_cross_entropy_of_targets_that_count():
    model = make_gpt()
    idx, targets = tokens(3, 8), tokens(3, 8, seed=1)
    targets[0, :5] = -1
    targets[2] = -1
    with torch.no_grad():
        logits, loss = model(idx, targets)
    slow = [-math.log(float(logits[b, t].softmax(-1)[targets[b, t]]))
            for b, t in itertools.product(range(3), range(8)) if targets[b, t] >= 0]
    assert len(slow) == 11
    assert float(loss) == pytest.approx(sum(slow) / 11)


@pytest.mark.parametrize("encoding", TEXT)
def test_positions_of_gpt(encoding):
    model = make_gpt(encoding)
    idx = tokens(2, 5)
    logits, _ = model(idx)
    torch.testing.assert_close(model(idx, positions=torch.arange(5))[0], logits)
    # A row of positions for each sequence, some the same, is each sequence alone.
    positions, batch = torch.tensor([[7, 2, 3, 0, 5], [0, 1, 2, 3, 4], [7, 2, 3, 0, 5]]), tokens(3, 5)
    together, _ = model(batch, positions=positions)
    for b in range(3):
        torch.testing.assert_close(together[b:b + 1], model(batch[b:b + 1], positions=positions[b])[0])
    if encoding != "nope":
        assert (together[::2] - model(batch[::2])[0]).abs().amax((1, 2)).min() > 0.01


@pytest.mark.parametrize("encoding", TEXT)
def test_gpt_cannot_see_the_future(encoding):
    model = make_gpt(encoding)
    idx = tokens(2, 8)
    logits, _ = model(idx)
    for t in range(1, 8):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        other, _ = model(changed)
        torch.testing.assert_close(other[:, :t], logits[:, :t])
        assert (other[:, t:] - logits[:, t:]).abs().amax((1, 2)).min() > 0.01


@pytest.mark.parametrize("encoding", TEXT)
def test_sequences_of_a_batch_do_not_meet(encoding):
    model = make_gpt(encoding)
    idx = tokens(3, 8)
    logits, _ = model(idx)
    for b in range(3):
        torch.testing.assert_close(model(idx[b:b + 1])[0][0], logits[b])


@pytest.mark.parametrize("encoding", TEXT)
def test_gradients_reach_every_parameter_of_gpt(encoding):
    model = make_gpt(encoding)
    model(tokens(4, 8), tokens(4, 8, seed=1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("shift", [1, 100, 700])
def test_relative_encodings_do_not_see_a_shift(encoding, shift):
    model = make_gpt(encoding)
    idx = tokens(2, 8)
    moved, _ = model(idx, positions=torch.arange(8) + shift)
    torch.testing.assert_close(moved, model(idx)[0], rtol=0, atol=2e-3)    # angles are of float32 frequencies
    other, _ = model(idx, positions=torch.arange(8) * 2)
    assert (other - moved).abs().max() > 0.1


@pytest.mark.parametrize("encoding", TEXT)
def test_gpt_interpolates_only_away_from_its_training_length(encoding):
    model = make_gpt(encoding)
    assert model(tokens(2, 8), interpolate=True)[0].equal(model(tokens(2, 8))[0])
    long = tokens(2, 16)
    stretch, _ = model(long, interpolate=True)
    by_hand = model.transform(model.tokens(long), model.pe(window((8,)), resize=((8,), (16,))))
    torch.testing.assert_close(stretch, by_hand @ model.tokens.weight.T)
    if encoding not in ("nope", "learned"):     # the learned table has no positions past 8, nope none at all
        assert (model(long)[0] - stretch).abs().max() > 0.01


@pytest.mark.parametrize("encoding", TEXT)
def test_gpt_under_autocast(encoding):
    model = make_gpt(encoding).float()
    idx = tokens(2, 8)
    exact, _ = model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("encoding", TEXT)
def test_a_saved_gpt_is_the_same_gpt(encoding):
    model, other = make_gpt(encoding, seed=0), make_gpt(encoding, seed=1)
    idx = tokens(2, 8)
    assert not torch.allclose(other(idx)[0], model(idx)[0])
    other.load_state_dict(model.state_dict())
    assert other(idx)[0].equal(model(idx)[0])


@pytest.mark.parametrize("encoding", ["seqpe-scalar", "nope"])
def test_dropout_acts_in_training_only(encoding):
    plain, model = make_gpt(encoding), make_gpt(encoding, dropout=0.5)
    idx = tokens(2, 8)
    torch.manual_seed(0)
    assert not torch.allclose(model(idx)[0], model(idx)[0])
    assert model.eval()(idx)[0].equal(plain(idx)[0])
    assert make_gpt(encoding, dropout=0, spread=0)(idx)[0].equal(plain(idx)[0])     # shares, not sizes


@pytest.mark.parametrize("encoding", TEXT)
@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(), dict(temperature=2.0, top_k=4)], ids=str)
def test_the_cache_changes_nothing(encoding, sampling):
    model = make_gpt(encoding)
    idx = tokens(3, 4)
    n = 4 if encoding == "learned" else 20      # the others go on past the training length of 8
    with_cache, without = (model.generate(idx, n, use_cache=use_cache, generator=seeded(), **sampling)
                           for use_cache in (True, False))
    assert with_cache.equal(without)
    assert with_cache.shape == (3, 4 + n) and with_cache[:, :4].equal(idx)
    assert sampling == dict(temperature=0) or len(with_cache[:, 4:].unique()) > 2


@pytest.mark.parametrize("encoding", TEXT)
def test_greedy_generation_takes_the_likeliest(encoding):
    model = make_gpt(encoding)
    idx = model.generate(tokens(2, 3), 5, temperature=0)
    logits, _ = model(idx)
    assert idx[:, 3:].equal(logits[:, 2:-1].argmax(-1))
    assert model.generate(tokens(2, 3), 5, top_k=1, generator=seeded()).equal(idx)


def test_sampling_keeps_to_the_top_k_and_to_the_generator():
    model = make_gpt()
    idx = model.generate(tokens(20, 2), 30, temperature=3.0, top_k=3, generator=seeded())
    rank = model(idx)[0][:, 1:-1].argsort(-1, descending=True).argsort(-1).gather(-1, idx[:, 2:, None])
    assert sorted(rank.unique().tolist()) == [0, 1, 2]
    assert model.generate(tokens(20, 2), 30, temperature=3.0, top_k=3, generator=seeded()).equal(idx)
    assert not model.generate(tokens(20, 2), 30, temperature=3.0, top_k=3, generator=seeded(1)).equal(idx)
    of_all = model.generate(idx, 2, top_k=1000, generator=seeded())
    assert of_all.equal(model.generate(idx, 2, generator=seeded()))


def test_a_low_temperature_sharpens_the_distribution():
    model = make_gpt()
    idx = tokens(1, 4).expand(2000, -1)
    p = (model(idx[:1])[0][0, -1] / 0.5).softmax(-1)
    drawn = model.generate(idx, 1, temperature=0.5, generator=seeded())[:, -1]
    assert (torch.bincount(drawn, minlength=11) / 2000 - p).abs().max() < 0.05


def test_generation_encodes_each_position_once_and_sees_each_token_once():
    model = make_gpt()
    encoded, read = [], []
    model.encoder.register_forward_hook(lambda module, args, e: encoded.append(e.shape[:-1].numel()))
    model.tokens.register_forward_hook(lambda module, args, e: read.append(args[0].size(1)))
    model.generate(tokens(2, 4), 10, generator=seeded())
    assert encoded == [13]          # the last token is never read
    assert read == [4] + [1] * 9


@pytest.mark.parametrize("encoding", TEXT)
@pytest.mark.parametrize("length", [1, 5])
def test_generating_nothing_returns_the_prompt(encoding, length):
    idx = tokens(2, length)
    assert make_gpt(encoding).generate(idx, 0).equal(idx)


@pytest.mark.parametrize("encoding, kwargs, limit, match", [
    ("learned", {}, 8, r"learned.*\(8,\).*\(8,\)"),
    ("seqpe-scalar", dict(n_digits=1), 10, r"10 is past.*0 to 9.*n_digits=2"),
])
def test_generation_stops_where_positions_end(encoding, kwargs, limit, match):
    model = make_gpt(encoding, **kwargs)
    assert model.pe.max_position == limit
    # The last token needs no position: it is never read.
    assert model.generate(tokens(1, 3), limit - 2, temperature=0).shape == (1, limit + 1)
    with pytest.raises(ValueError, match=match):
        model.generate(tokens(1, 3), limit - 1, temperature=0)


@pytest.mark.parametrize("make, encoding", [(make_gpt, "seqpe-scalar"), (make_gpt, "learned"),
                                            (make_gpt, "nope"), (make_vit, "seqpe-mul")])
def test_the_optimizer_holds_every_parameter_once(make, encoding):
    model = make(encoding)
    optimizer = model.configure_optimizers(1e-3, 0.2, betas=(0.8, 0.9))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    of_seqpe = set(model.pe.parameters()) if encoding.startswith("seqpe") else set()
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9)
        for p in group["params"]:
            assert group["weight_decay"] == (0.2 if p.dim() >= 2 else 0.0)
            assert group["of_seqpe"] == (p in of_seqpe) and group["lr"] == 1e-3


# ------------------------------------------------------------------------------------------------------------
# ViT


def images(*shape, seed=0):
    return randn(*shape, seed=seed)


def test_vit_is_the_plain_transformer():
    model = make_vit("nope")
    batch, weights = images(2, 2, 6, 4), weights_of(model)
    logits, loss = model(batch)
    assert loss is None and logits.shape == (2, 5)
    for row, image in zip(logits, batch):
        patches = torch.stack([image[:, y:y + 2, x:x + 2].flatten() for y in (0, 2, 4) for x in (0, 2)])
        h = patches @ weights["patches.weight"].flatten(1).T + weights["patches.bias"]
        h = torch.cat([weights["cls"][None], h])
        for layer in range(2):
            h = slow_block(h, weights, f"blocks.{layer}", 2, causal=False)
        slow = slow_linear(slow_layer_norm(h, weights, "ln")[0], weights, "head")
        torch.testing.assert_close(row, slow)
    targets = torch.tensor([4, 0])
    slow = -(logits[0].softmax(-1)[4].log() + logits[1].softmax(-1)[0].log()) / 2
    torch.testing.assert_close(model(batch, targets)[1], slow)


@pytest.mark.parametrize("encoding", IMAGE)
@pytest.mark.parametrize("height, width", [(8, 8), (4, 4), (4, 8), (6, 2), (12, 12), (6, 14)])
def test_images_of_any_size(encoding, height, width):
    model = make_vit(encoding)
    x = images(2, 2, height, width)
    stretch, _ = model(x, interpolate=True)
    assert stretch.shape == (2, 5) and stretch.isfinite().all()
    if encoding == "learned" and max(height, width) > 8:
        with pytest.raises(ValueError, match=r"learned table.*\(4, 4\).*interpolate=True"):
            model(x)
        return
    logits, _ = model(x)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    torch.testing.assert_close(model(x[1:])[0][0], logits[1])
    same = encoding == "nope" or (height, width) == (8, 8)
    assert torch.allclose(logits, stretch) == same


@pytest.mark.parametrize("encoding", ["seqpe-mul", "rope", "sinusoidal"])
@pytest.mark.parametrize("height, width", [(4, 12), (10, 6)])
def test_patches_of_an_oblong_image_are_at_row_and_column(encoding, height, width):
    model, grid = make_vit(encoding), (height // 2, width // 2)
    x = images(2, 2, height, width)
    h = torch.cat([model.cls.expand(2, 1, -1), model.patches(x).flatten(2).transpose(1, 2)], dim=1)
    for interpolate, signals in ((False, model.pe(window(grid))),
                                 (True, model.pe(window((4, 4)), resize=((4, 4), grid)))):
        slow = model.head(model.transform(h, signals)[:, 0])
        torch.testing.assert_close(model(x, interpolate=interpolate)[0], slow)


@pytest.mark.parametrize("encoding", IMAGE)
def test_positions_of_vit(encoding):
    model = make_vit(encoding)
    batch = images(6, 2, 4, 6)
    grids = window((2, 3)) + torch.tensor([[[0, 0]], [[2, 1]]])      # both inside the learned table
    torch.testing.assert_close(model(batch, positions=grids[0])[0], model(batch)[0])
    together, _ = model(batch, positions=grids.repeat_interleave(3, dim=0))
    for b in range(6):
        alone, _ = model(batch[b:b + 1], positions=grids[b // 3])
        torch.testing.assert_close(together[b:b + 1], alone)
    if encoding != "nope":
        assert (together[3:] - model(batch[3:])[0]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("encoding", IMAGE)
def test_vit_knows_where_a_patch_is_unless_it_has_no_encoding(encoding):
    model = make_vit(encoding)
    x = images(3, 2, 8, 8)
    patches = x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).transpose(3, 4).flatten(4)    # (B, C, 4, 4, 4)
    order = torch.randperm(16, generator=seeded())
    patches = patches.flatten(2, 3)[:, :, order].unflatten(2, (4, 4)).unflatten(4, (2, 2))
    permuted = patches.transpose(3, 4).flatten(4).flatten(2, 3)
    assert sorted(permuted.flatten().tolist()) == sorted(x.flatten().tolist())
    assert permuted[:, :, :2, :2].equal(x[:, :, 2 * (order[0] // 4):, 2 * (order[0] % 4):][:, :, :2, :2])
    assert torch.allclose(model(permuted)[0], model(x)[0]) == (encoding == "nope")


@pytest.mark.parametrize("encoding", IMAGE)
def test_vit_sees_the_patches_that_are_kept_and_no_others(encoding):
    model, x = make_vit(encoding), images(3, 2, 8, 8)                   # 4 x 4 patches
    upper = torch.arange(8)                                             # two rows of them
    cut = model(x[:, :, :4])[0]
    torch.testing.assert_close(model(x, kept=upper)[0], cut)
    torch.testing.assert_close(model(x, kept=upper[torch.randperm(8, generator=seeded())])[0], cut)
    torch.testing.assert_close(model(x, kept=torch.arange(16))[0], model(x)[0])
    positions = torch.stack([window((4, 4)).roll(i, 0) for i in range(3)])
    torch.testing.assert_close(model(x, positions=positions, kept=upper)[0],
                               model(x[:, :, :4], positions=positions[:, :8])[0])


@pytest.mark.parametrize("encoding", IMAGE)
def test_the_class_token_has_a_position_of_its_own(encoding):
    model = make_vit(encoding)
    for here, there, stretch in zip(model.pe(window((4, 4))), model.pe(window((2, 2)) + torch.tensor([1, 2])),
                                    model.pe(window((4, 4)), resize=((4, 4), (6, 6)))):
        for a, b, c in zip(here, there, stretch):
            if a is not None:
                assert a.size(-2) == 17 and b.size(-2) == 5 and c.size(-2) == 37
                torch.testing.assert_close(a[..., 0, :], b[..., 0, :])
                torch.testing.assert_close(a[..., 0, :], c[..., 0, :])
                # The patches' rows are where they are, after it: (1, 2) is row 7 of (4, 4).
                torch.testing.assert_close(a[..., 7, :], b[..., 1, :])
    if "rope" in encoding:      # where nothing turns
        cos, sin = here.rotate[..., 0, :]
        assert (cos == 1).all() and (sin == 0).all()
    elif encoding != "nope":
        before = model(images(2, 2, 8, 8))[0]
        with torch.no_grad():
            model.pe.cls += randn(*model.pe.cls.shape)
        assert (model(images(2, 2, 8, 8))[0] - before).abs().max() > 0.01


@pytest.mark.parametrize("encoding", IMAGE)
def test_gradients_reach_every_parameter_of_vit(encoding):
    model = make_vit(encoding)
    model(images(4, 2, 8, 8), torch.tensor([0, 1, 2, 3]))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


# ------------------------------------------------------------------------------------------------------------
# Three dimensions


def test_video_from_end_to_end():
    """(t, y, x) needs no code of its own: digits, windows, encoder, both regularisers."""
    shape, n_digits = (2, 3, 4), 3
    clips = window(shape) + torch.tensor([[[0, 0, 0]], [[997, 600, 31]]])
    assert clips.shape == (2, 24, 3)
    assert clips[1, ::4][:4].tolist() == [[997, 600, 31], [997, 601, 31], [997, 602, 31], [998, 600, 31]]
    digits = position_to_digits(clips, n_digits)
    assert digits[1, 0].tolist() == [9, 9, 7, 6, 0, 0, 0, 3, 1]
    assert digits_to_position(digits, n_digits).equal(clips)

    encoder = make_encoder(n_dim=3, n_digits=n_digits, base=10)
    e = encoder(clips)
    assert e.shape == (2, 24, 16) and F.pdist(e.flatten(0, 1)).min() > 1e-3
    torch.testing.assert_close(e[1, 23], slow_encoder(encoder, (998, 602, 34)))
    orders = torch.tensor(list(itertools.permutations((7, 80, 500))))
    assert F.pdist(encoder(orders)).min() > 1e-3

    loss = position_regularizers(encoder, shape, n_groups=4, n_candidates=6, n_students=2, generator=seeded())
    loss.backward()
    assert loss > 0 and encoder.dimension.weight.grad.norm(dim=1).min() > 0


@pytest.mark.parametrize("new", [(2, 3, 4), (4, 3, 2), (1, 5, 7)])
def test_a_box_is_stretched_linearly_along_each_axis(new):
    old, values = (2, 3, 4), randn(24, 5)
    slow = values.view(*old, 5)
    for axis, size in enumerate(new):
        slow = stretched(slow.transpose(0, axis), size).transpose(0, axis)
    torch.testing.assert_close(resize_grid(values, (old, new)), slow.reshape(-1, 5))


# ------------------------------------------------------------------------------------------------------------
# Errors


def gpt_config(**settings):
    return GPT(GPTConfig(**{**dict(n_layer=1, n_head=2, n_embd=8, block_size=8), **settings}))


def vit_config(**settings):
    return ViT(ViTConfig(**{**dict(n_layer=1, n_head=2, n_embd=8, image_size=8), **settings}))


def row(*values):
    return torch.tensor(values)


ERRORS = {
    "negative position": (lambda: position_to_digits(row(3, -2), 4), ValueError, "negative.*-2"),
    "position past the limit":
        (lambda: position_to_digits(row(5, 10000), 4), ValueError, "10000 .*4.*10.*9999.*n_digits=5"),
    "position far past the limit":
        (lambda: position_to_digits(row(123456), 4, 2), ValueError, "123456 .*4.*2.*15.*n_digits=17"),
    "float positions":
        (lambda: position_to_digits(row(1.0), 4), TypeError, "integers.*torch.float32"),
    "complex positions":
        (lambda: position_to_digits(row(1j), 4), TypeError, "integers.*torch.complex64"),
    "bool positions": (lambda: position_to_digits(row(True), 4), TypeError, "integers.*torch.bool"),
    "a list of positions": (lambda: position_to_digits([1, 2], 4), TypeError, "integers.*list"),
    "a number as position": (lambda: position_to_digits(7, 4), TypeError, "integers.*int"),
    "a scalar as position": (lambda: position_to_digits(torch.tensor(7), 4), ValueError, "n_dim.*scalar"),
    "base 1": (lambda: position_to_digits(row(0), 4, base=1), ValueError, "base.*at least 2.*got 1"),
    "no digits": (lambda: position_to_digits(row(0), 0), ValueError, r"n_digits.*at least 1.*\b0\b"),
    "too many digits": (lambda: position_to_digits(row(0), 64, 2), ValueError, "2.*n_digits=64.*64-bit"),
    "digits of half a position":
        (lambda: digits_to_position(row(1, 2, 3), 2), ValueError, "3 digits.*n_digits=2"),
    "digit past the base": (lambda: digits_to_position(row(1, 5), 2, 5), ValueError, "5.*0 to 4.*1 to 5"),
    "negative digit": (lambda: digits_to_position(row(-1, 5), 2), ValueError, "0 to 9.*-1 to 5"),
    "base 1 to read": (lambda: digits_to_position(row(0), 1, base=1), ValueError, "base.*at least 2.*got 1"),
    "no digits to read": (lambda: digits_to_position(row(0), 0), ValueError, r"n_digits.*at least 1.*\b0\b"),

    "encoder: negative": (lambda: SeqPE(8)(row(-5)), ValueError, "negative.*-5"),
    "encoder: past the limit":
        (lambda: SeqPE(8, n_digits=2)(row(100)), ValueError, "100 .*99.*n_digits=3"),
    "encoder: float": (lambda: SeqPE(8)(torch.ones(3)), TypeError, "integers.*torch.float32"),
    "encoder: bool": (lambda: SeqPE(8)(row(True)), TypeError, "integers.*torch.bool"),
    "encoder: list": (lambda: SeqPE(8)([1, 2]), TypeError, "integers.*list"),
    "encoder: wrong last dimension":
        (lambda: SeqPE(8, n_dim=2)(torch.zeros(4, 3).long()), ValueError, r"n_dim=2.*\(4, 3\)"),
    "encoder: no last dimension":
        (lambda: SeqPE(8, n_dim=2)(torch.tensor(3)), ValueError, "last dimension.*n_dim"),
    "encoder: n_embd and n_head": (lambda: SeqPE(10, 4), ValueError, "n_embd=10.*n_head=4"),
    "encoder: base 1": (lambda: SeqPE(8, base=1), ValueError, "base.*at least 2.*got 1"),
    "encoder: no digits": (lambda: SeqPE(8, n_digits=0), ValueError, r"n_digits.*at least 1.*\b0\b"),
    "encoder: no layers": (lambda: SeqPE(8, n_layer=0), ValueError, "n_layer.*at least 1.*0"),
    "encoder: no dimensions": (lambda: SeqPE(8, n_dim=0), ValueError, "n_dim.*at least 1.*0"),
    "encoder: no heads": (lambda: SeqPE(8, n_head=0), ValueError, "n_head.*at least 1.*0"),
    "encoder: no channels": (lambda: SeqPE(0), ValueError, "n_embd.*at least 1.*0"),

    "window that does not fit": (lambda: place_windows((4, 11), 2, 10), ValueError, r"\(4, 11\).*0 to 9"),
    "a window in no pieces": (lambda: place_windows((4,), 2, 10, 0), ValueError, "n_pieces.*at least 1, got 0"),
    "no windows": (lambda: place_windows((4,), 0, 10), ValueError, "n_windows.*at least 1, got 0"),
    "regularisers: window that does not fit":
        (lambda: position_regularizers(SeqPE(8, n_digits=1), (11,)), ValueError, r"\(11,\).*0 to 9"),
    "regularisers: a window of other dimensions":
        (lambda: position_regularizers(SeqPE(8, n_dim=2), (8,), 0), ValueError, r"\(8,\).*n_dim=2"),
    "regularisers: no groups":
        (lambda: position_regularizers(SeqPE(8), (8,), n_groups=0), ValueError, "n_groups.*at least 1"),
    "regularisers: no candidates":
        (lambda: position_regularizers(SeqPE(8), (8,), n_candidates=0), ValueError, "n_cand.*at least 1"),
    "regularisers: no students":
        (lambda: position_regularizers(SeqPE(8), (8,), n_students=0), ValueError, "n_students.*at least 1"),
    "regularisers: no samples":
        (lambda: position_regularizers(SeqPE(8), (8,), n_samples=0), ValueError, "n_samples.*at least 1"),
    "too many positions to sample":
        (lambda: sample_groups(2, 3, 1, 10), ValueError, "10000000000 .*16777216"),

    "block: n_embd and n_head": (lambda: Block(10, 4), ValueError, "n_embd=10.*n_head=4"),
    "gpt: n_embd and n_head": (lambda: gpt_config(n_embd=10, n_head=4), ValueError, "n_embd=10.*n_head=4"),
    "gpt: unknown encoding": (lambda: gpt_config(pe="rpoe"), ValueError, "'rpoe'.*" + ".*".join(ENCODINGS)),
    "gpt: unknown fusion": (lambda: gpt_config(fusion="sum"), ValueError, "'sum'.*" + ".*".join(FUSIONS)),
    "gpt: window that does not fit":
        (lambda: gpt_config(block_size=1001, n_digits=3), ValueError, r"\(1001,\).*0 to 999"),
    "gpt: too many digits": (lambda: gpt_config(n_digits=19), ValueError, "10.*n_digits=19.*64-bit"),
    "gpt: base 1": (lambda: gpt_config(base=1), ValueError, "base.*at least 2.*got 1"),
    "gpt: rope_mixed": (lambda: gpt_config(pe="rope_mixed"), ValueError, "rope_mixed.*2 dimensions"),
    "gpt: odd heads for rope": (lambda: gpt_config(pe="rope", n_embd=6), ValueError, "divisible by 2.*3"),
    "gpt: odd width for sinusoidal":
        (lambda: gpt_config(pe="sinusoidal", n_embd=9, n_head=3), ValueError, "divisible by 2.*9"),
    "gpt: past the table":
        (lambda: gpt_config(pe="learned")(torch.zeros(1, 9).long()), ValueError, r"\(8,\).*\(8,\).*interp"),
    "gpt: past the digits":
        (lambda: gpt_config(n_digits=1)(torch.zeros(1, 11).long()), ValueError, "10 .*0 to 9.*n_digits=2"),
    "gpt: negative positions, table":
        (lambda: gpt_config(pe="learned")(torch.zeros(1, 2).long(), positions=row(-1, 0)), ValueError, "-1"),
    "gpt: an empty prompt":
        (lambda: gpt_config().generate(torch.zeros(1, 0).long(), 3), ValueError, "at least one"),

    "vit: image and patch":
        (lambda: vit_config(image_size=30), ValueError, "image_size=30.*patch_size=4"),
    "vit: an image of other sizes":
        (lambda: vit_config()(torch.zeros(1, 1, 8, 10)), ValueError, r"\(8, 10\).*patch_size=4"),
    "vit: alibi": (lambda: vit_config(pe="alibi"), ValueError, "alibi.*text"),
    "vit: heads for rope": (lambda: vit_config(pe="rope", n_embd=12), ValueError, "divisible by 4.*6"),
    "vit: width for sinusoidal":
        (lambda: vit_config(pe="sinusoidal", n_embd=10), ValueError, "2-D.*divisible by 4.*10"),
    "vit: unknown encoding": (lambda: vit_config(pe="2d"), ValueError, "'2d'.*" + ".*".join(ENCODINGS)),
    "vit: window that does not fit":
        (lambda: vit_config(image_size=44, n_digits=1), ValueError, r"\(11, 11\).*0 to 9"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_value_and_the_limit(name):
    call, error, match = ERRORS[name]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "n_digits", "base", "pe_width", "block_size",
                                  "vocab_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_gpt_has_no_size_below_one(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least.*{value}"):
        gpt_config(**{name: value})


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "image_size", "patch_size", "n_channels",
                                  "n_classes"])
@pytest.mark.parametrize("value", [0, -1])
def test_vit_has_no_size_below_one(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least.*{value}"):
        vit_config(**{name: value})


def test_seqpe_needs_only_torch():
    tree = ast.parse(Path(seqpe.__file__).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} <= {"torch", *sys.stdlib_module_names}

# ------------------------------------------------------------------------------------------------------------
# train_lm.py

TINY = ["--block-size", "8", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--pe-width", "8",
        "--batch-size", "4", "--steps", "30", "--pe-warmup", "10"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(random.Random(0).choices("abcdef \n", k=3000)), encoding="utf-8")
    return path


def lm(corpus, tmp_path, *arguments):
    """train_lm.main on a tiny model; the results go to tmp_path / "out"."""
    results = train_lm.main([*TINY, "--data", str(corpus), "--out", str(tmp_path / "out"),
                             *map(str, arguments)])
    return {pe: tables["loss"] for pe, tables in results.items()}


def failure(capsys, monkeypatch, *arguments, script=train_lm):
    """The one line on stderr of a call that must end with exit code 2."""
    name = f"{script.__name__}.py"
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        train_lm.run_script(script.main)
    lines = [line for line in re.split("[\r\n]+", capsys.readouterr().err) if line and "it/s" not in line]
    assert exit_.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: "), lines
    return lines[0]


def final_weights(tmp_path, pe="seqpe"):
    (path,) = [p for p in (tmp_path / "out").glob(f"*-{pe}-*.pt") if not p.name.endswith(".part.pt")]
    return torch.load(path, weights_only=True)["model"]


def interrupted_after(monkeypatch, n_losses):
    """Ctrl-C while the loss of the n-th step is being computed."""
    original, calls = train_lm.training_loss, []

    def training_loss(*args):
        calls.append(1)
        if len(calls) == n_losses:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(train_lm, "training_loss", training_loss)


def test_all_encodings_are_trained_and_recorded(corpus, tmp_path, capsys):
    rows = lm(corpus, tmp_path, "--pe", "all")
    printed = capsys.readouterr().out
    for pe in ("seqpe", "rope", "alibi", "sinusoidal", "learned", "nope"):
        (path,) = (tmp_path / "out").glob(f"corpus-{pe}-seed0-*.json")
        record = json.loads(path.read_text())
        assert list(rows[pe]) == [8, 16, 32, 64, 128]
        assert record["results"] == {"loss": {str(length): loss for length, loss in rows[pe].items()}}
        assert record["pe"] == pe == record["arguments"]["pe"] and record["seed"] == 0
        assert record["device"] and record["data"] and record["seconds"] >= 0
        assert f"\n{pe} " in printed and f"{rows[pe][128]:.3f}" in printed
    assert not list((tmp_path / "out").glob("*.part.pt")) and not list((tmp_path / "out").glob("*.tmp"))


def test_the_same_seed_gives_the_same_numbers(corpus, tmp_path):
    assert lm(corpus, tmp_path / "a") == lm(corpus, tmp_path / "b") != lm(corpus, tmp_path / "c", "--seed", 1)


def test_training_learns(tmp_path):
    (tmp_path / "corpus.txt").write_text("abcdefgh" * 500)
    rows = lm(tmp_path / "corpus.txt", tmp_path, "--pe", "seqpe,rope", "--steps", 60)
    assert rows["seqpe"][8] < 1.0 and rows["rope"][8] < 1.0 < math.log(8)


def test_evaluation_scores_the_same_characters_at_every_length(corpus):
    args = argparse.Namespace(data=str(corpus), block_size=8, sample=None, device="cpu")
    task = train_lm.Text(args)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=len(task.about), n_layer=1, n_head=2, n_embd=16,
                          pe="rope"))
    scores, text = task.evaluate(model)["loss"], corpus.read_text()[2700:]
    for T in (8, 32):
        losses = []
        for window_ in task.windows(T):
            string = "".join(task.about[i] for i in window_)
            assert string in text and len(string) == T + 1
            log_p = model(window_[:-1].unsqueeze(0))[0][0].log_softmax(-1)
            losses += [-log_p[i, window_[i + 1]].item() for i in range(T - 8, T)]
        assert scores[T] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    ends = [["".join(task.about[i] for i in w[-9:]) for w in task.windows(T)] for T in task.lengths]
    assert all(end == ends[0] for end in ends)


def test_python_data_is_split_by_whole_files():
    train, val = train_lm.read_text("python")
    assert len(train) > 1_000_000 and len(val) > 100_000
    for file in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text in (val if zlib.crc32(file.name.encode()) % 10 == 0 else train)


@pytest.mark.parametrize("n_losses", [5, 10, 25], ids=["in the warm-up", "at its end", "in training"])
def test_resume_gives_the_weights_of_an_uninterrupted_run(corpus, tmp_path, monkeypatch, capsys, n_losses):
    lm(corpus, tmp_path / "a", "--out", tmp_path / "a" / "out")
    with monkeypatch.context() as patch:
        interrupted_after(patch, n_losses)
        with pytest.raises(SystemExit) as exit_:
            lm(corpus, tmp_path, "--pe", "seqpe,rope")
    assert exit_.value.code == 130
    assert f"stopped at step {n_losses} of 40" in capsys.readouterr().out
    lm(corpus, tmp_path, "--pe", "seqpe,rope", "--resume")
    assert f"going on from step {n_losses}" in capsys.readouterr().out
    whole, resumed = final_weights(tmp_path / "a"), final_weights(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_interrupted_run_shows_what_is_finished(corpus, tmp_path, monkeypatch, capsys):
    interrupted_after(monkeypatch, 33)      # 30 steps of rope, then 3 of alibi
    with pytest.raises(SystemExit):
        lm(corpus, tmp_path, "--pe", "rope,alibi")
    printed = capsys.readouterr().out
    assert "\nrope  " in printed and "alibi: stopped at step 3 of 30" in printed
    rows = lm(corpus, tmp_path, "--pe", "rope,alibi", "--resume")
    assert "is finished" in capsys.readouterr().out and list(rows) == ["rope", "alibi"]


def test_resume_scores_what_was_trained_but_not_scored(corpus, tmp_path, capsys):
    rows = lm(corpus, tmp_path, "--pe", "rope")
    (record,) = (tmp_path / "out").glob("*.json")
    record.unlink()
    assert lm(corpus, tmp_path, "--pe", "rope", "--resume") == rows
    assert "going on from step 30" in capsys.readouterr().out and record.exists()


def test_resume_refuses_other_arguments_and_names_them(corpus, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 5)
        with pytest.raises(SystemExit):
            lm(corpus, tmp_path)
    common = [*TINY, "--data", corpus, "--out", tmp_path / "out", "--resume"]
    error = failure(capsys, monkeypatch, *common, "--lr", "0.5")
    assert "lr is 0.003 there and 0.5 here" in error and "steps" not in error


def test_a_new_run_keeps_older_progress_until_it_is_further(corpus, tmp_path, monkeypatch, capsys):
    def interrupt_at(step):
        with monkeypatch.context() as patch:
            interrupted_after(patch, step)
            with pytest.raises(SystemExit):
                lm(corpus, tmp_path)
        (path,) = (tmp_path / "out").glob("*.part.pt")
        return torch.load(path, weights_only=True)["step"]

    assert interrupt_at(20) == 20
    assert interrupt_at(10) == 20 and "holds step 20" in capsys.readouterr().out
    assert interrupt_at(30) == 30
    lm(corpus, tmp_path)
    assert not list((tmp_path / "out").glob("*.part.pt"))
    lm(corpus, tmp_path)
    assert "replacing" in capsys.readouterr().out


def test_a_run_with_other_arguments_leaves_the_results_alone(corpus, tmp_path):
    lm(corpus, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    lm(corpus, tmp_path, "--steps", 20)
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(before)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch, capsys):
    original = train_lm.training_loss
    monkeypatch.setattr(train_lm, "training_loss",
                        lambda *args: original(*args) * (math.nan if args[4] > 22 else 1))
    error = failure(capsys, monkeypatch, *TINY, "--data", corpus, "--out", tmp_path / "out")
    assert "not finite at step 40" in error and not list((tmp_path / "out").glob("*.pt"))


def test_a_full_disk_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    train_lm.write_file(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_lm.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; what was there before is kept"):
        train_lm.write_file(path, b"new and longer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(corpus, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_lm.os, "fsync", full)
    assert "No space left" in failure(capsys, monkeypatch, *TINY, "--data", corpus, "--out", tmp_path / "out")


def test_killed_at_any_moment_a_run_leaves_a_loadable_checkpoint(corpus, tmp_path):
    script = Path(train_lm.__file__)
    command = [sys.executable, str(script), *TINY, "--steps", "100000", "--data", str(corpus),
               "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.part.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    (path,) = (tmp_path / "out").glob("*.part.pt")
    assert train_lm.load_checkpoint(path)["step"] % 100 == 0


def test_load_samples_and_evaluates_without_training(corpus, tmp_path, monkeypatch, capsys):
    rows = lm(corpus, tmp_path)
    (path,) = (tmp_path / "out").glob("*.pt")
    results = {"seqpe": {"loss": rows["seqpe"]}}
    assert train_lm.main(["--load", str(path), "--eval", "--sample", "abc"]) == results
    assert f"{rows['seqpe'][128]:.3f}" in capsys.readouterr().out
    corpus.unlink()         # a sample needs no data
    train_lm.main(["--load", str(path), "--sample", "abc"])
    assert "\nabc" in capsys.readouterr().out
    assert "'Z'" in failure(capsys, monkeypatch, "--load", path, "--sample", "aZ")
    assert "corpus" in failure(capsys, monkeypatch, "--load", path, "--eval")
    damaged = {"truncated": path.read_bytes()[:500], "foreign": b"not a checkpoint", "empty": b""}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert "not a checkpoint of this script" in failure(capsys, monkeypatch, "--load", tmp_path / name)
    torch.save({"model": {}}, tmp_path / "older")
    assert "not a checkpoint of this script" in failure(capsys, monkeypatch, "--load", tmp_path / "older")


@pytest.mark.parametrize("content, said", [
    (None, "No such file"), (b"", "too few"), (b"a", "too few"), (b"a" * 5000, "too few"),
    (b"ab" * 10, "too few"), (bytes(range(256)) * 20, "not a UTF-8 text file")],
    ids=["missing", "empty", "one character", "one different", "short", "binary"])
def test_data_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, content, said):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    assert said in failure(capsys, monkeypatch, *TINY, "--data", path, "--out", tmp_path / "out")


@pytest.mark.parametrize("arguments, said", [
    (["--pe", "rotary"], "known: seqpe, rope"), (["--fusion", "sum"], "known: scalar, mul"),
    (["--steps", 0], "at least 1, got 0"), (["--block-size", 0], "at least 1, got 0"),
    (["--batch-size", -1], "at least 1, got -1"), (["--n-head", 3], "n_embd=16 is not divisible by n_head=3"),
    (["--pe-width", 9], "width=9 must be divisible by n_head=2"), (["--base", 1], "at least 2, got 1"),
    (["--digits", 1], "use --digits 2"), (["--digits", 30], "64-bit"), (["--lr", "nan"], "got nan"),
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--contrastive-weight", -0.1], "at least 0, got -0.1"), (["--device", "cudax"], "'cudax'"),
    (["--pe", "rope", "--n-embd", 10, "--n-head", 2], "rope in 1-D"),
    (["--nonsense"], "--nonsense"), (["--load", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (["--data", "."], "Is a directory"), (["--sample", "aZ"], "outside the vocabulary: 'Z'")])
def test_arguments_that_cannot_be_used_are_one_line(corpus, tmp_path, monkeypatch, capsys, arguments, said):
    common = [*TINY, "--data", corpus, "--out", tmp_path / "out"]
    assert said in failure(capsys, monkeypatch, *common, *arguments)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "'cuda'" in failure(capsys, monkeypatch, "--device", "cuda")


def test_random_arguments_work_or_are_one_line(corpus, tmp_path, monkeypatch, capsys):
    draw = random.Random(0)
    choices = {"--pe": ["seqpe", "rope", "alibi,nope", "all", "", "x"], "--fusion": list(FUSIONS),
               "--block-size": [0, 1, 2, 9, 400], "--n-head": [1, 2, 3], "--n-embd": [0, 6, 8],
               "--digits": [1, 3, 4], "--base": [1, 2, 36], "--batch-size": [1, 3, 8], "--seed": [-1, 5],
               "--shift-prob": [0, 0.5, 1, -1], "--contrastive-weight": [0, 0.1],
               "--distill-weight": [0, 0.1], "--pe-warmup": [0, 2], "--lr": [0, 1e-3, "inf"]}
    outcomes = Counter()
    for i in range(40):
        names = draw.sample(sorted(choices), 4)
        arguments = [*TINY, "--steps", 2, "--data", corpus, "--out", tmp_path / str(i)]
        for name in names:
            arguments += [name, draw.choice(choices[name])]
        monkeypatch.setattr(sys, "argv", ["train_lm.py", *map(str, arguments)])
        try:
            train_lm.run_script(train_lm.main)
            outcomes["success"] += 1
        except SystemExit as exit_:
            error = capsys.readouterr().err.splitlines()[-1:]      # the bars of earlier successes precede it
            assert exit_.code == 2 and error and error[0].startswith("train_lm.py: "), (arguments, error)
            outcomes["error"] += 1
        capsys.readouterr()
    assert min(outcomes["success"], outcomes["error"]) >= 8


def test_text_too_short_for_the_longest_context_says_so(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abcd" * 120)       # 48 characters of validation text
    rows = lm(tmp_path / "short.txt", tmp_path, "--pe", "rope")
    assert list(rows["rope"]) == [8, 16, 32]
    assert "at context lengths [8, 16, 32] only" in capsys.readouterr().out


def test_a_download_is_checked_once_and_a_wrong_one_is_kept_apart(tmp_path):
    source, path = tmp_path / "source", tmp_path / "data" / "file"
    source.write_bytes(b"content")
    good = hashlib.sha256(b"content").hexdigest()
    assert train_lm.download(source.as_uri(), path, good).read_bytes() == b"content"
    source.unlink()
    assert train_lm.download(source.as_uri(), path, good) == path       # it is there: not fetched again
    with pytest.raises(ValueError, match="SHA-256"):
        train_lm.download(source.as_uri(), path, hashlib.sha256(b"other").hexdigest())
    assert not path.exists() and (tmp_path / "data" / "file.bad").read_bytes() == b"content"
    with pytest.raises(ValueError, match="offline"):
        train_lm.download(source.as_uri(), path, good)
    assert not path.exists()


def test_a_download_that_breaks_off_is_one_line_and_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nten bytes.")
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        with pytest.raises(ValueError, match=r"could not download .*10 bytes read"):
            train_lm.download(url, tmp_path / "file", "")
    assert not list(tmp_path.iterdir())


def test_heat_map_is_a_picture_of_the_dot_products(monkeypatch):
    torch.manual_seed(0)
    encoder = SeqPE(8, 2)
    lines = train_lm.heat_map(encoder, size=8).splitlines()
    assert len(lines) == 5 and all(len(line) == 8 + 2 + 8 for line in lines[1:])
    e = encoder(torch.arange(8))
    dots = e @ e.T
    grey = ((dots - dots.min()) / (dots.max() - dots.min())).tolist()
    for row, line in enumerate(lines[1:]):
        pixels = zip(grey[2 * row], grey[2 * row + 1])
        expected = "".join(" ░▒▓█"[round(2 * (upper + lower))] for upper, lower in pixels)
        assert line[:8] == expected
    few = train_lm.heat_map(SeqPE(8, 2, n_digits=1), size=32).splitlines()     # shown once, as that is all
    assert few[0].rstrip() == "e_i . e_j, 0 to 9" and all(len(line) == 10 for line in few[1:])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[38;5;" in train_lm.heat_map(encoder, size=8)


# ------------------------------------------------------------------------------------------------------------
# train_lm.py --data recall

RECORD = re.compile("@([a-z]{2})=([0-9]{3})")


@pytest.fixture(scope="module")
def recall():
    """The task on windows of 64 characters, of which 42 are records and questions."""
    args = argparse.Namespace(data="recall", block_size=64, batch_size=16, sample=None, device="cpu")
    task = train_lm.Recall(args)
    task.val = task.val[:20_000]
    return task


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


def test_records_may_repeat_each_other(recall):
    n_different = torch.tensor([[1], [2], [3]])
    haystack = torch.full((3, 101), recall.about.index("x"))
    texts = strings(recall, recall.ask(haystack, seeded(), n_different))
    assert [len(set(RECORD.findall(text))) for text in texts] == [1, 2, 3]
    assert [len(RECORD.findall(text)) for text in texts] == [6, 6, 6]


def test_recall_is_decided_by_its_generator(recall):
    state = torch.get_rng_state()
    first, second = recall.batch(seeded(1)), recall.batch(seeded(1))
    assert torch.equal(first, second) and not torch.equal(first, recall.batch(seeded(2)))
    assert torch.equal(torch.get_rng_state(), state) and first.shape == (16, 65)
    assert torch.equal(recall.windows(128), recall.windows(128))


def recall_model(task, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, n_digits=4, vocab_size=len(task.about),
                         block_size=task.args.block_size))


def test_recalls_loss_is_that_of_answers_and_text(recall):
    model, batch = recall_model(recall).double(), recall.batch(seeded())[:3]
    log_p = model(batch[:, :-1])[0].log_softmax(-1)
    nats = -torch.stack([log_p[b, t, batch[b, t + 1]] for b in range(3) for t in range(64)]).view(3, 64)
    answers = [64 - 21 + 7 * question + 4 + digit for question in range(3) for digit in range(3)]
    torch.testing.assert_close(recall.loss(model, batch), nats[:, answers].mean() + nats.mean())


def test_an_answer_is_right_when_greedy_decoding_writes_it(recall, monkeypatch):
    model, digits = recall_model(recall), recall.encode("01")
    with torch.no_grad():       # an untrained model seldom writes a digit: this one writes 0 or 1
        model.ln.bias.copy_(1000 * model.tokens.weight[digits].sum(0))
        model.tokens.weight[digits] = model.tokens.weight[digits].mean(0) + 1e-3 * randn(2, 16).float()
    text = recall.ask(recall.val[:50 * 65].view(50, 65), seeded())
    places = torch.arange(65 - 21, 65).view(3, 7)[:, 4:]
    text[:, places.flatten()] = digits[torch.randint(2, (50, 9), generator=seeded())]
    right = recall.right(model, text)
    expected = []
    for row in text:
        for place in places:
            written = model.generate(row[None, :place[0]], 3, temperature=0)[0, -3:]
            expected.append(100.0 * torch.equal(written, row[place]))
    assert right.flatten().tolist() == expected and 0 < sum(expected) < len(expected) * 100


def test_recall_counts_by_length_and_by_distance(recall, monkeypatch):
    """A model that knows only the records of the last 100 characters."""
    def right(model, text):
        rows = []
        for line in strings(recall, text):
            rows.append([])
            for question in range(len(line) - 21, len(line), 7):
                distance = question - line.find(line[question:question + 4])
                rows[-1].append(100.0 * (distance <= 100))
                if len(line) == 1025:
                    column = max(64, 2 ** math.ceil(math.log2(distance)))
                    by_distance.setdefault(column, []).append(rows[-1][-1])
        return torch.tensor(rows)

    by_distance = {}
    monkeypatch.setattr(recall, "right", right)
    scores = recall.evaluate(None)
    assert list(scores) == list(recall.tables) == ["exact_match", "exact_match_by_distance"]
    assert list(scores["exact_match"]) == [64, 128, 256, 512, 1024] and scores["exact_match"][64] == 100
    assert scores["exact_match"][1024] < 20
    expected = {T: sum(found) / len(found) for T, found in sorted(by_distance.items())}
    assert scores["exact_match_by_distance"] == pytest.approx(expected)
    assert expected[64] == 100 > expected[128] > 0 == expected[1024]


def test_recall_from_end_to_end(tmp_path, monkeypatch, capsys):
    arguments = [*TINY, "--data", "recall", "--block-size", 48, "--steps", 3]
    arguments = [*map(str, arguments), "--out", str(tmp_path)]
    monkeypatch.setattr(train_lm.Recall, "n_evaluated", 8)
    results = train_lm.main([*arguments, "--pe", "seqpe,learned"])
    assert list(results["learned"]["exact_match"]) == [48, 96, 192, 384, 768]
    printed = capsys.readouterr().out
    assert all(title in printed for title in train_lm.Recall.tables.values())
    (path,) = tmp_path.glob("recall-seqpe-*.pt")
    assert train_lm.main(["--load", str(path), "--eval"]) == {"seqpe": results["seqpe"]}
    assert "at least 42" in failure(capsys, monkeypatch, *arguments, "--block-size", 41)


def test_presets_yield_to_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(train_lm, "run_all", lambda make_task, args: seen.append((args.steps, args.data)))
    for arguments in ([], ["--data", "recall"], ["--data", "recall", "--steps", "7"]):
        train_lm.main(arguments)
    preset = train_lm.PRESETS["recall"]["steps"]
    assert seen == [(800, "python"), (preset, "recall"), (7, "recall")]
    monkeypatch.setattr(train_lm, "bench", lambda args: args.pe)
    assert train_lm.main(["--bench"]) == ["seqpe", "rope", "alibi", "sinusoidal", "learned", "nope"]
    assert train_lm.main(["--bench", "2", "--pe", "seqpe,rope"]) == ["seqpe", "rope"]


def test_shifted_steps_share_eight_windows(monkeypatch):
    """What GPT and ViT are given on a shifted step."""
    args = argparse.Namespace(contrastive_weight=0, distill_weight=0, shift_prob=1, batch_size=20, pieces=3,
                              device="cpu")
    for model, shape in ((make_gpt(), (8,)), (make_vit(), (4, 4))):
        asked, given = Counter(), []
        task = argparse.Namespace(batch=lambda data: None,
                                  loss=lambda _, __, positions: given.append(positions) or torch.zeros(()))

        def place(shape_, n_windows, max_position, n_pieces):
            assert (shape_, max_position) == (shape, model.encoder.max_position)
            asked[n_windows, n_pieces] += 1
            return place_windows(shape_, n_windows, max_position, n_pieces)

        monkeypatch.setattr(train_lm, "place_windows", place)
        for _ in range(60):
            train_lm.training_loss(task, model, model, None, 0, 0, args)
        assert set(asked) == {(8, 1), (8, 2), (8, 3)} and min(asked.values()) > 10
        for positions in given:
            assert positions.shape == (20, math.prod(shape), len(shape))
            assert positions[:8].equal(positions[8:16]) and positions[:4].equal(positions[16:])
        args.shift_prob = 0
        train_lm.training_loss(task, model, model, None, 0, 0, args)
        assert given[-1] is None
        args.shift_prob = 1


def test_bench_measures_every_encoding(tmp_path, monkeypatch, capsys):
    # Threads in place of fresh processes, which would take a minute to start.
    monkeypatch.setattr(train_lm, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    found = train_lm.main([*TINY, "--bench", "--pe", "seqpe,rope", "--digits", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["results"] == found
    for unit in ("ms", "MiB"):
        for name in ("step", *(f"read {8 * 2 ** i}" for i in range(7))):
            assert set(found[f"{name}, {unit}"]) == {"seqpe", "rope"} and f"{name}, {unit}" in printed
            assert all(value >= 0 for value in found[f"{name}, {unit}"].values())
    assert set(found["of it sampling, ms"]) == {"seqpe"} and "%)" in printed
    assert found["step, characters/s"]["rope"] == 1000 * 4 * 8 / found["step, ms"]["rope"]
    assert "1.00x" in printed
    # A short reading, by a model made for sixteen times the training length.
    train_lm.main([*TINY, "--bench", "1", "--pe", "seqpe", "--digits", "1", "--out", str(tmp_path)])


# ------------------------------------------------------------------------------------------------------------
# train_vit.py

SMALL = ["--image-size", "8", "--patch-size", "2", "--n-layer", "1", "--n-head", "2", "--n-embd", "16",
         "--pe-width", "8", "--batch-size", "4", "--steps", "4", "--pe-warmup", "3"]


def images_task(**settings):
    usual = dict(data="digits", image_size=8, patch_size=2, batch_size=4, keep=0.5, device="cpu")
    return train_vit.Images(argparse.Namespace(**usual | settings))


def write_npz(path, **arrays):
    generator = np.random.default_rng(0)
    arrays = {"images": generator.integers(0, 256, (40, 6, 5), dtype=np.uint8),
              "labels": np.arange(40) % 3, **arrays}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_the_digits_are_ucis():
    path = Path(train_vit.__file__).parent / "data" / "digits.csv.gz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in (path.parent / "README.md").read_text(encoding="utf-8")
    images, labels, is_test = train_vit.read_images("digits")
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 240
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180] and is_test is None


def test_every_digit_is_in_one_split():
    task = images_task()
    sizes = {name: len(labels) for name, (_, labels) in task.splits.items()}
    assert sizes == {"train": 1199, "val": 200, "test": 398}
    rows = [tuple(row.tolist()) for images, _ in task.splits.values() for row in images.flatten(1)]
    every = [tuple(row.tolist()) for row in train_vit.read_images("digits")[0].flatten(1)]
    assert Counter(rows) == Counter(every)
    assert all(len(labels.unique()) == 10 for _, labels in task.splits.values())


@pytest.mark.parametrize("size", [3, 8, 20])
def test_images_are_drawn_at_any_size(size):
    images = train_vit.read_images("digits")[0][:5]
    drawn = train_vit.draw(images, size)
    assert drawn.shape == (5, 1, size, size) and drawn.min() >= -1 and drawn.max() <= 1
    if size == 8:
        torch.testing.assert_close(drawn, images / 255 * 2 - 1)


def test_augmented_images_are_parts_of_the_image(monkeypatch):
    images = train_vit.read_images("digits")[0][:6]
    state = torch.get_rng_state()
    first, second = (train_vit.augment(images, 16, seeded(1)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, train_vit.augment(images, 16, seeded(2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (6, 1, 16, 16) and first.min() >= -1 and first.max() <= 1

    def augmented(zoom, angle=0.5, x=0.5, y=0.5):
        """Each of these is drawn uniformly from 0 to 1."""
        drawn = torch.tensor([zoom, angle, x, y])[:, None].expand(4, 6)
        monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)
        return train_vit.augment(images, 8, None)

    no_zoom = math.sqrt(math.log(1 / 0.75, 4))
    same = images / 255 * 2 - 1
    torch.testing.assert_close(augmented(no_zoom), same, rtol=0, atol=1e-5)
    middle = train_vit.draw(images, 24)[..., 8:16, 8:16]       # of the image at 3x; the filters differ a bit
    assert (augmented(1.0) - middle).abs().mean() < 0.05 < (augmented(1.0) - same).abs().mean()
    assert not torch.allclose(augmented(no_zoom, angle=1.0), same, atol=0.1)
    to_the_right = augmented(1.0, x=1.0)        # 1 - 1 / 3, and a tenth beyond the border of [-1, 1]
    assert (to_the_right[..., -1] < -0.9).all() and not torch.allclose(to_the_right, augmented(1.0), atol=0.1)


def test_accuracy_counts_what_is_right():
    task = images_task()
    model = make_vit("rope", image_size=8, n_channels=1, n_classes=10).float()
    images, labels = task.splits["test"]
    right = [model(train_vit.draw(image[None], 12))[0].argmax().item() == label
             for image, label in zip(images, labels.tolist())]
    assert task.accuracy(model, "test", 12) == pytest.approx(100 * sum(right) / len(right))


def test_a_step_looks_at_a_random_share_of_the_patches():
    task = images_task()
    kept = [task.batch(seeded(i))[2] for i in range(200)]
    assert {len(k) for k in kept} == set(range(8, 17))          # of 16
    assert all(len(k.unique()) == len(k) for k in kept)
    assert torch.cat(kept).bincount().min() > 100               # any of them
    assert torch.equal(kept[0], task.batch(seeded(0))[2])
    assert len(images_task(keep=1.0).batch(seeded())[2]) == 16
    assert len(images_task(keep=0.01).batch(seeded())[2]) >= 1


def test_the_mode_is_chosen_on_validation_images(monkeypatch):
    task, asked = images_task(), Counter()

    def accuracy(model, split, size, interpolate=False):
        asked[split, size, interpolate] += 1
        better = interpolate == (size > 16)         # on the validation images; the test's disagree
        return size + (50.0 if better == (split == "val") else 10.0)

    monkeypatch.setattr(task, "accuracy", accuracy)
    results = task.evaluate(make_vit("rope"))
    assert list(results) == list(task.tables)
    assert results["accuracy"] == {8: 58, 12: 22, 16: 26, 20: 30, 24: 34}
    assert results["accuracy_extended"] == {8: 58, 12: 22, 16: 26, 20: 70, 24: 74}
    assert results["accuracy_interpolated"] == {8: 58, 12: 62, 16: 66, 20: 30, 24: 34}
    assert max(asked.values()) == 1
    asked.clear()
    task.evaluate(make_vit("learned"))
    assert all(interpolate for _, _, interpolate in asked)


def test_images_from_end_to_end(tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--pe", "all", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupted_after(patch, 9)     # seqpe's 7 steps, then 2 of rope's
        with pytest.raises(SystemExit):
            train_vit.main(arguments)
    results = train_vit.main([*arguments, "--resume"])
    assert "going on from step 2" in capsys.readouterr().out
    assert list(results) == ["seqpe", "rope", "rope_mixed", "sinusoidal", "learned", "nope"]
    assert all(list(row) == [8, 12, 16, 20, 24] for tables in results.values() for row in tables.values())
    (path,) = tmp_path.glob("digits-seqpe-*.pt")
    assert train_vit.main(["--load", str(path), "--eval"]) == {"seqpe": results["seqpe"]}
    assert "e_i . e_j" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(40, 6, 5), (40, 9, 4, 3)], ids=["grey", "RGB"])
def test_images_of_ones_own(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = write_npz(tmp_path / "own.npz", images=images)
    found, labels, _ = train_vit.read_images(str(path))
    assert torch.equal(found.squeeze(1) if len(shape) == 3 else found.movedim(1, -1), torch.from_numpy(images))
    assert labels.tolist() == [i % 3 for i in range(40)]
    results = train_vit.main([*SMALL, "--data", str(path), "--pe", "seqpe", "--out", str(tmp_path / "out")])
    assert set(results["seqpe"]["accuracy"]) == {8, 12, 16, 20, 24}


@pytest.mark.parametrize("content, said", [
    (None, "No such file"), (b"", "not an .npz"), (b"not a zip archive", "not an .npz"),
    (b"PK\x03\x04" + bytes(60), "not an .npz"), (dict(labels=None), "arrays `images` and `labels`"),
    (dict(images=np.zeros((40, 6, 5))), "must be uint8"),
    (dict(images=np.zeros((40, 6), np.uint8)), "must be uint8"),
    (dict(images=np.zeros((40, 6, 5, 4), np.uint8)), "must be uint8"),
    (dict(images=np.zeros((0, 6, 5), np.uint8), labels=np.zeros(0, int)), "must be uint8"),
    (dict(labels=np.arange(39)), "labels (N,)"), (dict(labels=np.arange(40) - 1), "labels (N,)"),
    (dict(labels=np.arange(40) / 2), "labels (N,)"), (dict(labels=np.array(["a"] * 40)), "not an .npz"),
    (dict(labels=np.array([None] * 40)), "not an .npz"),
    (dict(images=np.zeros((5, 6, 5), np.uint8), labels=np.arange(5)), "too few")])
def test_images_that_cannot_be_used_are_one_line(tmp_path, monkeypatch, capsys, content, said):
    path = tmp_path / "own.npz"
    if isinstance(content, dict):
        write_npz(path, **content)
    elif content is not None:
        path.write_bytes(content)
    error = failure(capsys, monkeypatch, *SMALL, "--data", path, "--out", tmp_path / "out", script=train_vit)
    assert said in error


@pytest.mark.parametrize("arguments, said", [
    (["--keep", 0], "above 0 and at most 1, got 0.0"), (["--keep", "nan"], "at most 1, got nan"),
    (["--image-size", 0], "at least 1, got 0"), (["--image-size", 9], "not divisible by patch_size=2"),
    (["--pe", "alibi"], "known: seqpe, rope"), (["--base", 4, "--digits", 1], "use --digits 2"),
    (["--data", "."], "Is a directory"), (["--n-embd", 12, "--n-head", 2, "--pe", "rope"], "rope in 2-D"),
    (["--load", "nowhere.pt"], "no such checkpoint")])
def test_image_arguments_that_cannot_be_used_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    assert said in failure(capsys, monkeypatch, *SMALL, "--out", tmp_path, *arguments, script=train_vit)


def test_a_checkpoint_of_text_is_no_checkpoint_of_images(corpus, tmp_path, monkeypatch, capsys):
    lm(corpus, tmp_path, "--steps", 2)
    (path,) = (tmp_path / "out").glob("*.pt")
    assert "checkpoint" in failure(capsys, monkeypatch, "--load", path, script=train_vit)
    train_vit.main([*SMALL, "--out", str(tmp_path / "vit")])
    (path,) = (tmp_path / "vit").glob("*.pt")
    assert "checkpoint" in failure(capsys, monkeypatch, "--load", path)


def test_cifar10_is_read_from_its_archive(tmp_path, monkeypatch):
    path, generator = tmp_path / "cifar-10-binary.tar.gz", np.random.default_rng(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    batches = {name: generator.integers(0, 10, (20, 3073), dtype=np.uint8) for name in names}
    with tarfile.open(path, "w:gz") as archive:
        for name, batch in reversed(batches.items()):
            (tmp_path / name).write_bytes(batch.tobytes())
            archive.add(tmp_path / name, f"cifar-10-batches-bin/{name}")
    monkeypatch.setattr(train_vit, "download", lambda url, to, sha256: path)
    images, labels, is_test = train_vit.read_images("cifar10")
    whole = torch.from_numpy(np.concatenate(list(batches.values())))
    assert images.shape == (120, 3, 32, 32) and is_test.tolist() == [False] * 100 + [True] * 20
    assert torch.equal(labels, whole[:, 0].long()) and torch.equal(images.flatten(1), whole[:, 1:])
    assert images[119, 2, 31, 30] == whole[119, 1 + 2 * 1024 + 31 * 32 + 30]


def test_the_settings_for_cifar10_make_models(monkeypatch):
    monkeypatch.setattr(train_vit, "run_all", lambda make_task, args: args)
    args = train_vit.main(["--data", "cifar10", "--pe", "all"])
    task = train_vit.Images(args, {"n_channels": 3, "n_classes": 10}, read=False)
    for pe in args.pe:
        assert task.model(pe)(torch.zeros(1, 3, 96, 96), interpolate=True)[0].shape == (1, 10)


# ------------------------------------------------------------------------------------------------------------
# README.md

README = (Path(seqpe.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_only_options_that_exist(capsys):
    for script in (train_lm, train_vit):
        with pytest.raises(SystemExit):
            script.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z-]+", README))
    assert "--pe" in named and named <= known, named - known


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
                    text = text.replace(variable, "0" if variable == "$seed" else value)
                found.add((script, text))
    return sorted(found)


@pytest.mark.parametrize("script, arguments", readme_commands())
def test_the_readmes_commands_run(script, arguments, tmp_path, monkeypatch, capsys):
    """In their small form: the same options, then those of a tiny model."""
    monkeypatch.setattr(train_lm, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    monkeypatch.setattr(train_lm.Text, "n_evaluated", 2)
    module, small = {"train_lm": (train_lm, [*TINY, "--block-size", "48", "--steps", "3"]),
                     "train_vit": (train_vit, SMALL)}[script]
    if "--bench" in arguments:
        small += ["--bench", "2"]
    assert module.main([*shlex.split(arguments), *small, "--out", str(tmp_path)])
    assert list(tmp_path.glob("*.json"))


def test_the_readmes_picture_before_training_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lm.Text, "n_evaluated", 2)
    train_lm.main(["--steps", "1", "--pe-warmup", "0", "--device", "cpu", "--out", str(tmp_path)])
    picture = re.compile(r"before training\n(.*?)\n\n", re.S)
    theirs, ours = (re.sub(r" +$", "", picture.search(text)[1], flags=re.M)
                    for text in (README, capsys.readouterr().out))
    assert len(theirs) == len(ours)
    # Another machine's last bit may round a shade the other way.
    assert sum(a != b for a, b in zip(theirs, ours)) <= 3


def test_the_readme_example_trains(tmp_path):
    """The block that shows SeqPE in somebody else's attention layer, run beside a copy of seqpe.py alone."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "seqpe.py").write_bytes(Path(seqpe.__file__).read_bytes())
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

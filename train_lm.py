"""Train a small GPT on characters, then read on far beyond the length it was trained on.

    python train_lm.py --pe seqpe               real text, Python's own standard library: no download
    python train_lm.py --pe all --seed 0,1,2    every encoding, three times each, in one table and one chart
    python train_lm.py --recipe paper           SeqPE trained as in the paper
    python train_lm.py --data recall            records in that text, asked for again at its end
    python train_lm.py --data FILE              other text, in UTF-8
    python train_lm.py --resume                 go on after Ctrl-C, a crash or a closed laptop
    python train_lm.py --load out/FILE.pt --sample "def " --eval
"""

import argparse
import io
import json
import math
import os
import signal
import statistics
import string
import sys
import sysconfig
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C in the imports

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer
from tqdm import tqdm

from seqpe import (FUSIONS, GPT, GPTConfig, TransformerConfig, count_bias, place_windows,
                   position_regularizers, warm_up)

# ------------------------------------------------------------------------------------------------------------
# Arguments

RECIPES = {     # all that two ways to train SeqPE differ in: ours, the paper's, the range, what it is
    "--shift-prob": (0.5, 0.1, 0.0, 1.0, "share of steps with windows at random places"),
    "--pieces": (4, 1, 1, 64, "most pieces, apart from each other, of such a window"),
    "--shifted-ood": (1, 0, 0, 1, "1: L_OOD on those steps, too"),
    "--distill-weight": (0.1, 0.1 / 32, 0.0, 1e3, "weight of L_OOD; the paper's code averages over rows"),
    "--paper-groups": (0, 1, 0, 1, "1: draw and compare groups in L_delta as the paper does"),
    "--pe-warmup": (1000, 0, 0, 10 ** 6, "steps of SeqPE's encoder alone before the model's first"),
    "--pe-norm": (6.0, 0.0, 0.0, 1e3, "length of e_p in each head; 0: as it comes"),
    "--map-std": (0.0, 0.02, 0.0, 1e3, "of the maps W at the start; 0: multiples of the identity"),
    "--pe-embd": (64, 0, 0, 8192, "size of e_p and width of its encoder, for scalar; 0: the model's"),
    "--pe-dropout": (0.0, 0.1, 0.0, 0.9, "dropout in SeqPE's encoder"),
}
OPTIONS = {     # the default (None: see DEFAULTS), the range, what it is
    "--contrastive-weight": (0.1, 0.0, 1e3, "weight of L_delta"),
    "--base": (10, 2, 4096, "base of the digits"),
    "--max-position": (None, 1, 2 ** 30, "positions that SeqPE holds; if not given, as many as are read"),
    "--n-layer": (4, 1, 128, "layers of the model"),
    "--n-head": (4, 1, 128, "heads of a layer, in the model and in SeqPE's encoder"),
    "--n-embd": (None, 1, 8192, "width of the model"),
    "--steps": (None, 1, 10 ** 7, "training steps"),
    "--batch-size": (32, 1, 65536, "sequences in a step"),
    "--lr": (None, 0.0, 10.0, "peak learning rate"),
}
DEFAULTS = {"python": dict(n_embd=128, steps=800, lr=3e-3, fusion="scalar"),
            "recall": dict(n_embd=128, steps=1200, lr=1e-3, fusion="scalar")}
NO_SETTINGS = ("seeds", "out", "resume", "load", "sample", "eval", "split", "device", "bench")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(least, most):
    """For argparse: a number of most's type, from least to most."""
    def parse(text):
        value = type(most)(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {text[:20]!r}")
        return value
    parse.__name__ = type(most).__name__        # for argparse's own message: invalid int value
    return parse


def comma_list(kind):
    def parse(text):
        return [kind(each) for each in text.split(",")]
    parse.__name__ = kind.__name__
    return parse


def parse(argv, doc, encodings, options, defaults, recipes={}, more={}):
    """The arguments of a script; those not given come from recipes, else from defaults, else from RECIPES."""
    parser = Parser(description=(doc or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pe", type=comma_list(str), default=["seqpe"],
                        help=f"a comma list of {', '.join(encodings)}; or all")
    parser.add_argument("--data", default=next(iter(defaults)), help=f"{', '.join(defaults)}, or a file")
    parser.add_argument("--recipe", choices=("ours", "paper"), default="ours", help="how SeqPE is trained")
    for flag, (ours, paper, *limits, text) in RECIPES.items():
        parser.add_argument(flag, type=number(*limits), help=f"{text} (ours {ours}, the paper's {paper:.3g})")
    for flag, (default, *limits, text) in {**OPTIONS, **options}.items():
        parser.add_argument(flag, type=number(*limits), default=default, help=f"{text} ({default})")
    parser.add_argument("--fusion", choices=FUSIONS, help="how SeqPE enters the model")
    parser.add_argument("--seed", type=comma_list(number(0, 2 ** 32)), default=[0], dest="seeds",
                        help="seed of everything random, or a comma list of them")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of checkpoints and results")
    parser.add_argument("--load", type=Path, metavar="CHECKPOINT", help="look at a checkpoint instead")
    parser.add_argument("--split", choices=("test", "val"), default="test",
                        help="what tables score; settings are chosen on val")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds of this command")
    parser.add_argument("--eval", action="store_true", help="with --load: print its table")
    for flag, keywords in more.items():
        parser.add_argument(flag, **keywords)
    args = parser.parse_args(argv)
    recipe = {flag[2:].replace("-", "_"): row[args.recipe == "paper"] for flag, row in RECIPES.items()}
    chosen = defaults.get(args.data, next(iter(defaults.values())))
    for name, value in {**recipe, **chosen, **recipes.get(args.recipe, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.pe = encodings if "all" in args.pe else list(dict.fromkeys(args.pe))
    args.seeds = list(dict.fromkeys(args.seeds))
    if unknown := set(args.pe) - set(encodings):
        parser.error(f"unknown --pe {min(unknown)!r}; known: {', '.join([*encodings, 'all'])}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no cuda here; try --device cpu")
    if (args.eval or vars(args).get("sample") is not None) and not args.load:
        parser.error("--eval and --sample go with --load: training ends with a table and a sample anyway")
    return args


# ------------------------------------------------------------------------------------------------------------
# Data


def read_text(data):
    """--data -> {split: text}."""
    if data in ("python", "recall"):
        # Whole files, by the last digit of a checksum of their name: 1 is for the test, 0 for validation.
        text = {"train": "", "val": "", "test": ""}
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            split = {0: "val", 1: "test"}.get(zlib.crc32(file.name.encode()) % 10, "train")
            text[split] += file.read_text(encoding="utf-8")
        return text
    try:
        text = Path(data).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--data {data}: not a UTF-8 text file") from None
    except OSError as error:
        raise ValueError(f"--data {data}: {error.strerror}; give python, recall or a text file") from None
    cuts = len(text) * 8 // 10, len(text) * 9 // 10
    return {"train": text[:cuts[0]], "val": text[cuts[0]:cuts[1]], "test": text[cuts[1]:]}


class Text:
    """Next-character prediction, scored on the same last characters with more and more context."""
    form, n_evaluated = ".3f", 64       # of a score: how it is written, and of how many windows of text

    def __init__(self, args, about=None):
        """about: what a checkpoint knows of its data, here its characters."""
        self.args, self.about = args, about
        self.lengths = [args.block_size * 2 ** i for i in range(args.reach.bit_length())]   # 1x, 2x, 4x, ...

    def read(self):
        text = read_text(self.args.data)
        if self.about is None:
            self.about = "".join(sorted(set().union(*text.values())))
        self.splits = {name: self.encode(split) for name, split in text.items()}
        if len(self.about) < 2 or min(map(len, text.values())) <= self.lengths[-1]:
            raise ValueError(f"--data {self.args.data}: {len(self.about)} different characters in splits of "
                             f"{[len(split) for split in text.values()]} are too few to read "
                             f"{self.lengths[-1]} at once; try a smaller --reach or --block-size")

    def encode(self, text):
        index = {character: i for i, character in enumerate(self.about)}
        if unknown := set(text) - set(index):
            raise ValueError(f"characters outside the vocabulary: {''.join(sorted(unknown))[:20]!r}")
        return torch.tensor([index[character] for character in text], dtype=torch.long)

    def model(self, pe):
        return GPT(GPTConfig(**model_settings(self.args, pe, self.lengths[-1]), vocab_size=len(self.about),
                             block_size=self.args.block_size))

    def batch(self, generator):
        """(B, T + 1) characters of training text."""
        T, text = self.args.block_size, self.splits["train"]
        start = torch.randint(len(text) - T, (self.args.batch_size, 1), generator=generator)
        return text[start + torch.arange(T + 1)]

    def loss(self, model, batch, positions, bias):
        batch = batch.to(self.args.device)
        return model(batch[:, :-1], batch[:, 1:], positions, bias)[1]

    def windows(self, split, T):
        """(n_evaluated, T + 1) characters of a split, which end at the same places for every T."""
        text = self.splits[split]
        ends = torch.linspace(self.lengths[-1] + 1, len(text), self.n_evaluated, dtype=torch.float64).long()
        return text[ends.unsqueeze(1) + torch.arange(-T - 1, 0)]

    @torch.no_grad()
    def predict(self, model, text):
        """The logits (n, L, vocab_size) of the last L = block_size characters of text (n, T + 1)."""
        batches = text[:, :-1].to(self.args.device).split(max(1, 16384 // text.size(1)))
        # The table has nothing to say beyond its last position: it is stretched.
        stretch = model.config.pe == "learned"
        return torch.cat([model(batch, interpolate=stretch)[0][:, -self.args.block_size:].cpu()
                          for batch in tqdm(batches, "reading", leave=False, delay=5)])

    def score(self, model, split, T):
        """The loss on the last block_size characters of T, in nats per character."""
        text = self.windows(split, T)
        logits = self.predict(model, text)
        return F.cross_entropy(logits.flatten(0, 1), text[:, -self.args.block_size:].flatten()).item()

    def validate(self, model):
        return self.score(model, "val", self.args.block_size)

    def evaluate(self, model):
        """{title of a table: {column: score}}"""
        return {"nats per character with a context of":
                {T: self.score(model, self.args.split, T) for T in self.lengths}}

    def show(self, model):
        """A sample longer than the training context, where the encoding can."""
        prompt = self.args.sample or ("\n" if "\n" in self.about else self.about[0])
        longest = min(2 * self.args.block_size, model.pe.max_position or math.inf)
        idx = self.encode(prompt).unsqueeze(0).to(self.args.device)
        generator = torch.Generator(self.args.device).manual_seed(self.args.seed)
        idx = model.generate(idx, max(1, longest - len(prompt)), 0.8, top_k=20, generator=generator)
        print("\n" + "".join(self.about[i] for i in idx[0].tolist()))


class Recall(Text):
    """Records such as @ab=731 in real text; at its end their keys are asked for again, in another order."""
    form, n_evaluated = ".1f", 256
    size, n_records = len("@ab=731"), 3
    questions = torch.arange(-n_records * size, 0).view(n_records, size)    # where they are, from the end
    answers = questions[:, -3:]

    def __init__(self, args, about=None):
        if args.block_size < 2 * self.questions.numel():
            raise ValueError(f"--data recall needs a --block-size of at least {2 * self.questions.numel()}")
        super().__init__(args, about)

    def ask(self, text, generator, n_different=n_records):
        """Write records over text (B, T + 1) at random places, and the same in another order over its end.

        n_different, an integer or (B, 1): how many of the records are, the others repeat them.
        """
        B, n, size = len(text), self.n_records, self.size
        letters, digits = self.encode(string.ascii_lowercase), self.encode(string.digits)
        at, equals = self.encode("@=").expand(B, n, 2).unbind(-1)
        key = torch.rand(B, 26 * 26, generator=generator).topk(n).indices                   # distinct
        value = torch.randint(1000, (B, n), generator=generator)
        records = torch.stack([at, letters[key // 26], letters[key % 26], equals, digits[value // 100],
                               digits[value // 10 % 10], digits[value % 10]], dim=-1)       # (B, n, size)
        which = torch.arange(n).expand(B, n) % n_different
        records = records.gather(1, which.unsqueeze(-1).expand_as(records))
        # Sorted places in a text without the records become places that do not overlap in one with them.
        place = torch.randint(text.size(1) - 2 * n * size + 1, (B, n), generator=generator).sort().values
        place = (place + size * torch.arange(n)).unsqueeze(-1) + torch.arange(size)         # (B, n, size)
        text = text.scatter(1, place.flatten(1), records.flatten(1))
        order = torch.rand(B, n, 1, generator=generator).argsort(1).expand_as(records)
        text[:, self.questions] = records.gather(1, order)
        return text

    def batch(self, generator):
        # Copying is learned from texts with a record that is repeated, finding the right one from the others.
        n_different = torch.randint(1, self.n_records + 1, (self.args.batch_size, 1), generator=generator)
        return self.ask(super().batch(generator), generator, n_different)

    def loss(self, model, batch, positions, bias):
        """That of the answers and the language model's: an answer's character counts 15 times any other's."""
        batch = batch.to(self.args.device)
        logits, loss = model(batch[:, :-1], batch[:, 1:], positions, bias)
        return loss + F.cross_entropy(logits[:, self.answers].flatten(0, 2), batch[:, self.answers].flatten())

    def score(self, model, split, T):
        """The share of answers, in %, that greedy decoding gets right, all three digits.

        All of the text is read at once: the likeliest digit after right ones is what decoding would write.
        """
        text = self.ask(self.windows(split, T), torch.Generator().manual_seed(T))
        logits = self.predict(model, text)
        right = (logits[:, self.answers].argmax(-1) == text[:, self.answers]).all(-1)       # (n, n_records)
        return right.float().mean().item() * 100

    def evaluate(self, model):
        return {"% of answers right with a context of": next(iter(super().evaluate(model).values()))}


def model_settings(args, pe, longest):
    """Of a GPT or ViT, from the arguments; longest: how many positions are read."""
    if args.max_position and args.max_position < longest:
        raise ValueError(f"--max-position {args.max_position} is too small: {longest} positions are read")
    found = {field.name: getattr(args, field.name) for field in fields(TransformerConfig)}
    return found | {"pe": pe, "max_position": args.max_position or longest}


# ------------------------------------------------------------------------------------------------------------
# Files


def write_file(path, data):
    """Write to a name of this process alone, then move into place: path is never half written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def reading(path):
    """Whatever a missing, damaged or foreign checkpoint makes torch and us say is one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception:
        raise ValueError(f"{path}: not a checkpoint of this script, or a damaged one") from None


def settings(args):
    """What makes a run what it is; the rest is where it runs, and what is shown of it."""
    return {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}


def read_checkpoint(path, args, task=None):
    """The checkpoint at path; with a task, of the same arguments and data."""
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        json.dumps([checkpoint[key] for key in ("settings", "about", "step")])      # plain values all of them
        theirs, ours = checkpoint["settings"], settings(args)
        if theirs.keys() != ours.keys() or any(here is not None and type(theirs[name]) is not type(here)
                                               for name, here in ours.items()):
            raise TypeError
    for name in ours if task else ():
        if theirs[name] != ours[name]:
            raise ValueError(f"{path}: --{name.replace('_', '-')} is {theirs[name]} there, "
                             f"{ours[name]} here; another --out starts anew")
    if task and checkpoint["about"] != task.about:
        raise ValueError(f"{path} was trained on other data than {args.data} now holds")
    return checkpoint


def check_finite(model, where):
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{where}: weights that are not finite; train with a smaller --lr")


# ------------------------------------------------------------------------------------------------------------
# Training


def training_loss(task, model, batch, args):
    """The model's loss and SeqPE's regularisers, on a step that may be shifted."""
    encoder, positions, bias = model.encoder, None, None
    shifted = encoder is not None and torch.rand(()).item() < args.shift_prob
    if shifted:
        # Eight windows for the sequences to share, as each costs the encoder a reading of T positions.
        windows = place_windows(model.shape, 8, encoder.max_position, args.pieces)      # (8, T, n_dim)
        which = torch.arange(args.batch_size) % 8
        positions = windows[which]                                                      # (B, T, n_dim)
        if args.pieces > 1 and encoder.n_dim == 1:
            bias = count_bias(windows)[which].to(args.device)                           # (B, 1, T, T)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        loss = task.loss(model, batch, positions, bias)
    if encoder is None:
        return loss
    distill_weight = args.distill_weight if args.shifted_ood or not shifted else 0.0
    return loss + position_regularizers(encoder, model.shape, args.contrastive_weight, distill_weight,
                                        n_groups=16 if args.paper_groups else 4, paper=args.paper_groups)


def train(task, args, path, stop):
    """Train args.pe, or go on with it at path; returns the model."""
    torch.manual_seed(args.seed)
    data = torch.Generator().manual_seed(args.seed)     # the same batches for every encoding
    model = task.model(args.pe).to(args.device)
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) == is_matrix],
               "weight_decay": 0.1 * is_matrix} for is_matrix in (False, True)]     # only matrices decay
    # An encoding's gradient is clipped apart from the model's, as either may be much the larger.
    of_pe = set(model.pe.parameters())
    parts = [p for p in model.parameters() if p not in of_pe], [p for p in model.parameters() if p in of_pe]
    optimizer, first = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True), 0
    if path.exists():
        checkpoint = read_checkpoint(path, args, task)
        with reading(path):
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["random"]["torch"])
            data.set_state(checkpoint["random"]["data"])
            if args.device == "cuda":
                torch.cuda.set_rng_state_all(checkpoint["random"]["cuda"])
            first = int(checkpoint["step"])
        check_finite(model, path)
        print(f"{path}: {'finished' if first == args.steps else f'going on from step {first}'}")
    elif model.encoder and args.pe_warmup:
        print(f"warming up SeqPE's encoder for {args.pe_warmup} steps")
        warm_up(model.encoder, model.shape, args.pe_warmup)

    def save():
        check_finite(model, f"{args.pe} at step {step + 1}")
        random = {"torch": torch.get_rng_state(), "data": data.get_state(),
                  "cuda": torch.cuda.get_rng_state_all() if args.device == "cuda" else []}
        buffer = io.BytesIO()
        torch.save(dict(settings=settings(args), step=step + 1, model=model.state_dict(), random=random,
                        optimizer=optimizer.state_dict(), about=task.about), buffer)
        write_file(path, buffer.getvalue())

    shown, bar = {}, tqdm(range(first, args.steps), args.pe, args.steps, initial=first, mininterval=1)
    for step in bar:
        # Up in 5 % of the steps, then by a cosine to a tenth.
        done = step / args.steps
        rate = args.lr * min(1.0, 20 * (done + 1 / args.steps)) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = training_loss(task, model, task.batch(data), args)
        loss.backward()
        for part in parts:
            torch.nn.utils.clip_grad_norm_(part, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = step + 1 == args.steps
        if step % 20 == 19:             # .item() waits for a GPU
            bar.set_postfix(shown | {"loss": f"{loss.item():.3f}"})
        if step % 100 == 99 or last or stop:
            save()
            shown["val"] = f"{task.validate(model.eval()):.3f}"
            model.train()
        if stop and not last:
            bar.close()
            print(f"{path} holds step {step + 1} of {args.steps}; --resume goes on from there")
            raise KeyboardInterrupt
    return model.eval()


# ------------------------------------------------------------------------------------------------------------
# What is shown at the end


def over_seeds(rows):
    """rows {encoding: [{column: score} of each seed]} -> the columns, {encoding: [(mean, deviation)]}"""
    columns = list(next(iter(rows.values()))[0])
    scores = {pe: [[seed[column] for seed in seeds] for column in columns] for pe, seeds in rows.items()}
    return columns, {pe: [(statistics.mean(s), statistics.stdev(s) if len(s) > 1 else 0.0) for s in row]
                     for pe, row in scores.items()}


def table(title, form, rows):
    """As Markdown, mean ± standard deviation."""
    columns, found = over_seeds(rows)
    lines = [title, "", f"{'encoding':<10}" + "".join(f" | {column:>11}" for column in columns),
             "---" + " | ---" * len(columns)]
    for pe, row in found.items():
        cells = [f"{mean:{form}}" + f"±{deviation:{form}}" * (len(rows[pe]) > 1) for mean, deviation in row]
        lines.append(f"{pe:<10}" + "".join(f" | {cell:>11}" for cell in cells))
    return "\n".join([*lines, ""])


def chart(title, rows):
    """The same as an SVG: a line through the means, a bar for the deviation, SeqPE's in red."""
    columns, found = over_seeds(rows)
    ends = [score for row in found.values() for mean, d in row for score in (mean - d, mean + d)]
    low, high = (0, 100) if "%" in title else (min(ends), max(ends))
    x = [36 + 180 * i / max(1, len(columns) - 1) for i in range(len(columns))]

    def y(score):
        return 200 - 160 * (score - low) / (high - low or 1)

    svg = [SVG, f'<text x="8" y="20">{title}</text>']
    svg += [f'<text x="{at}" y="222" text-anchor="middle">{column}</text>' for at, column in zip(x, columns)]
    for tick in (low, (low + high) / 2, high):
        svg.append(f'<text x="30" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
                   f'<path class="tick" d="M36,{y(tick):.1f}H216"/>')
    name_at = math.inf
    for pe, row in sorted(found.items(), key=lambda item: item[1][-1]):     # from below: names make way
        name_at = min(y(row[-1][0]) + 4, name_at - 13)
        line = " ".join(f"{at:.0f},{y(mean):.1f}" for at, (mean, _) in zip(x, row))
        bars = "".join(f"M{at:.0f},{y(m - d):.1f}V{y(m + d):.1f}" for at, (m, d) in zip(x, row))
        svg.append(f'<g class="{"us" if pe == "seqpe" else "them"}"><polyline points="{line}"/>'
                   f'<path d="{bars}"/><text x="222" y="{name_at:.1f}">{pe}</text></g>')
    return "\n".join([*svg, "</svg>", ""])


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 290 230"><style>
text { font: 12px sans-serif; fill: #59636e } polyline, path { fill: none; stroke: #818b98 }
.tick { stroke: #d1d9e0 } .us polyline, .us path { stroke: #d1242f; stroke-width: 3 }
.us text { fill: #d1242f; font-weight: bold }
@media (prefers-color-scheme: dark) { text { fill: #9198a1 } .tick { stroke: #3d444d }
.us polyline, .us path { stroke: #ff7b72 } .us text { fill: #ff7b72 } }</style>"""


@torch.no_grad()
def heat_map(encoder, size=32):
    """e_i . e_j as a picture, in the training window and across the longest carry of the digits."""
    size = min(size, encoder.max_position)
    carry = min(encoder.base ** (encoder.n_digits - 1) - size // 2, encoder.max_position - size)
    pictures = []
    for start in sorted({0, max(0, carry)}):        # one, where that is all there is
        e = encoder(torch.arange(start, start + size).unsqueeze(-1).expand(-1, encoder.n_dim)).cpu()
        dots = e @ e.T
        grey = ((dots - dots.min()) / (dots.max() - dots.min()).clamp(min=1e-9)).tolist()
        pictures.append([f"{f'e_i . e_j, {start} to {start + size - 1}':<{size}}"] + [
            "".join(" ░▒▓█"[round(2 * (u + v))] for u, v in zip(upper, lower))
            for upper, lower in zip(grey[0::2], grey[1::2])])
    return "\n".join(map("  ".join, zip(*pictures)))


# ------------------------------------------------------------------------------------------------------------
# All of it


def report(task, results, args):
    """results {table: {encoding: [row of each seed]}} as JSON, as charts and, printed, as tables."""
    stem = f"{Path(args.data).stem}-{','.join(args.pe)}-seed{','.join(map(str, args.seeds))}"
    record = {"device": args.device, "split": args.split, "arguments": settings(args), "results": results}
    write_file(args.out / f"{stem}.json", json.dumps(record, indent=1).encode())
    for i, (title, rows) in enumerate(results.items()):
        write_file(args.out / f"{stem}{f'-{i}' if i else ''}.svg", chart(title, rows).encode())
        print("\n" + table(title, task.form, rows))


def look_at_checkpoint(make_task, args):
    """--load: nothing is trained."""
    vars(args).update(pe="", seed=0)
    checkpoint = read_checkpoint(args.load, args)
    with reading(args.load):
        vars(args).update(checkpoint["settings"])
        task = make_task(args, checkpoint["about"])
        model = task.model(args.pe)
        model.load_state_dict(checkpoint["model"])
    check_finite(model.to(args.device).eval(), args.load)
    if args.eval:
        task.read()
        for title, row in task.evaluate(model).items():
            print(table(title, task.form, {args.pe: [row]}))
    task.show(model)


def run_all(make_task, args):
    """Train each encoding with each seed, or look at args.load -> {table: {encoding: [row of each seed]}}."""
    torch.set_float32_matmul_precision("high")      # TF32 on CUDA
    torch.set_flush_denormal(True)                  # a CPU is slow with the far tails of a softmax
    if args.load:
        return look_at_checkpoint(make_task, args)
    args.out.mkdir(parents=True, exist_ok=True)
    task, encodings, results, stop = make_task(args), args.pe, {}, []
    task.read()
    runs = [(pe, seed, args.out / f"{Path(args.data).stem}-{pe}-seed{seed}.pt")
            for seed in args.seeds for pe in encodings]
    for args.pe, args.seed, path in runs:       # what is wrong with any is said before the first is trained
        with torch.device("meta"):      # no memory is needed yet
            n = sum(parameter.numel() for parameter in task.model(args.pe).parameters())
        if n > 10 ** 9:
            raise ValueError(f"{args.pe}: a model of {n:,} weights is too large for this script")
        if path.exists():
            read_checkpoint(path, args, task)
            if not args.resume:
                raise ValueError(f"{path} exists: --resume goes on with it, another --out starts anew")

    def on_signal(*_):      # the first one ends the step and saves, the second one ends the program
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    before = [(each, signal.signal(each, on_signal)) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        for args.pe, args.seed, path in runs:
            model = train(task, args, path, stop)
            for title, row in task.evaluate(model).items():
                results.setdefault(title, {}).setdefault(args.pe, []).append(row)
            task.show(model)
            if model.encoder:
                print(heat_map(model.encoder))
    finally:
        for each, handler in before:
            signal.signal(each, handler)
        args.pe, args.seed = encodings, args.seeds
        if results:
            report(task, results, args)
    return results


def bench(args, n_rounds=5):
    """Median milliseconds of a training step and of reading, as multiples of the last encoding's, too."""
    args.reach = 64
    task = Text(args)
    task.read()

    def jobs_of(pe):
        model, data = task.model(pe).to(args.device), torch.Generator().manual_seed(0)

        def step(shift_prob):
            args.shift_prob = shift_prob
            training_loss(task, model, task.batch(data), args).backward()
            model.zero_grad()

        @torch.no_grad()
        def read(T):
            model(torch.zeros(1, T, dtype=torch.long, device=args.device), interpolate=pe == "learned")

        reading = {f"read {T}": partial(read, T) for T in task.lengths[::2]}
        return {"step": partial(step, 0), "shifted step": partial(step, 1), **reading}

    jobs = {pe: jobs_of(pe) for pe in args.pe}
    times = {pe: {name: [] for name in row} for pe, row in jobs.items()}
    for _ in tqdm(range(n_rounds + 1)):         # in turns: a drifting machine favours none
        for pe, row in jobs.items():
            for name, work in row.items():
                began = timer()
                work()
                times[pe][name].append(1000 * (timer() - began))
    for name in times[args.pe[0]]:
        median = {pe: statistics.median(row[name][1:]) for pe, row in times.items()}
        print(f"{name:<12}" + "".join(f"{pe:>12} {t:9.1f} ms ({t / median[args.pe[-1]]:.2f}x)"
                                      for pe, t in median.items()))


def main(argv=None):
    options = {"--block-size": (128, 1, 65536, "training length, in characters"),
               "--reach": (16, 1, 1024, "how many times that length is read at the end")}
    encodings = ["seqpe", "rope", "alibi", "sinusoidal", "learned", "nope"]
    more = {"--sample": dict(metavar="PROMPT", help="with --load: text to go on from"),
            "--bench": dict(action="store_true", help="measure speed instead")}
    args = parse(argv, __doc__, encodings, options, DEFAULTS, more=more)
    return bench(args) if args.bench else run_all(make_task, args)


def make_task(args, about=None):
    return (Recall if args.data == "recall" else Text)(args, about)


def run_script(main):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a console may not have all characters
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        hint = "" if isinstance(error, (ValueError, OSError)) else "out of memory, try smaller sizes: "
        print(f"{Path(sys.argv[0]).name}: {hint}{str(error).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)

"""Train a small GPT on characters, then read on far beyond the length it was trained on.

    python train_lm.py --pe seqpe           real text, Python's own standard library: no download
    python train_lm.py --pe all             every encoding in turn, on the same batches, in one table
    python train_lm.py --data shakespeare   or --data FILE: other text
    python train_lm.py --data recall        records in that text, asked for again at its end
    python train_lm.py --resume             go on after Ctrl-C, a crash or a closed laptop
    python train_lm.py --load out/FILE.pt --sample "def " --eval
"""

import argparse
import hashlib
import http.client
import io
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import string
import sys
import sysconfig
import time
import urllib.request
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer
from tqdm import tqdm

from seqpe import (FUSIONS, GPT, GPTConfig, digits_needed, place_windows, position_regularizers,
                   sample_groups, window)

PRESETS = {"recall": dict(steps=1200, lr=1e-3), "bench": dict(pe="all")}
CHECKPOINT = ("settings", "step", "model", "optimizer", "random", "about")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
STATUS = Path("/proc/self/status")
NO_SETTINGS = ("pe", "out", "resume", "load", "sample", "eval", "device", "compile", "bench")   # same run

# ------------------------------------------------------------------------------------------------------------
# Arguments and data


class Parser(argparse.ArgumentParser):
    """The arguments that train_lm.py and train_vit.py share."""

    def __init__(self, description, encodings):
        super().__init__(description=description.split("\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.encodings = encodings
        for name, kind, default, text in (
                ("--pe", self.names, "seqpe", f"a comma list of {', '.join(encodings)}; or all"),
                ("--fusion", str, "scalar", f"how SeqPE enters the model: {', '.join(FUSIONS)}"),
                ("--digits", at_least(1), 3, "digits of a position"),
                ("--base", at_least(2), 16, "base of the digits"),
                ("--pe-width", at_least(1), 64, "width of SeqPE's encoder"),
                ("--spread", at_least(0, float), 8.0, "SeqPE's heads at first: 0 all alike, 8 as ALiBi's"),
                ("--contrastive-weight", at_least(0, float), 0.1, "weight of L_delta; 0 turns it off"),
                ("--distill-weight", at_least(0, float), 0.1, "weight of L_OOD; 0 turns it off"),
                ("--shift-prob", at_least(0, float), 0.5, "share of steps with windows at random places"),
                ("--pieces", at_least(1), 4, "most pieces, apart from each other, of such a window"),
                ("--pe-warmup", at_least(0), 1000, "steps of SeqPE's encoder alone before the model's"),
                ("--n-layer", at_least(1), 4, "layers of the model"),
                ("--n-head", at_least(1), 4, "heads of a layer, in the model and in SeqPE's encoder"),
                ("--n-embd", at_least(1), 128, "width of the model"),
                ("--steps", at_least(1), 800, "training steps"),
                ("--batch-size", at_least(1), 32, "sequences in a step"),
                ("--lr", at_least(0, float), 3e-3, "peak learning rate after the warm-up"),
                ("--pe-lr", at_least(0, float), 1.0, "that of SeqPE's encoder and maps, in times of --lr"),
                ("--seed", int, 0, "seed of everything random"),
                ("--device", pick_device, "auto", "cuda, mps or cpu; auto takes the first there is"),
                ("--out", Path, "out", "folder of checkpoints and results")):
            self.add_argument(name, type=kind, default=default, help=text)
        self.add_argument("--load", type=Path, metavar="CHECKPOINT", help="a checkpoint to look at instead")
        for name, text in (("--eval", "with --load: print its table"),
                           ("--compile", "torch.compile the model"),
                           ("--resume", "go on with the interrupted run of the same arguments")):
            self.add_argument(name, action="store_true", help=text)

    def names(self, text):
        names = self.encodings if text == "all" else text.split(",")
        if unknown := set(names) - set(self.encodings):
            known = ", ".join([*self.encodings, "all"])
            raise argparse.ArgumentTypeError(f"unknown {min(unknown)!r}; known: {known}")
        return names

    def parse(self, argv, presets):
        """parse_args, with other defaults for some of the data; unlike those, presets are not in --help."""
        known = vars(self.parse_known_args(argv)[0])
        self.set_defaults(**presets.get("bench" if known.get("bench") else known["data"], {}))
        return self.parse_args(argv)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(low, kind=int):
    def parse(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return kind(text)
    parse.__name__ = kind.__name__      # for argparse's own message: invalid int value
    return parse


def pick_device(name):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    if not there.get(name):
        raise argparse.ArgumentTypeError(f"torch finds no {name!r} here; try auto or cpu")
    return name


def download(url, path, sha256):
    """Fetch url to path, once; what does not have the right SHA-256 is kept apart and not used."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                write_file(path, response.read())
        except (OSError, http.client.HTTPException) as error:       # no connection, or one that broke off
            raise ValueError(f"could not download {url} ({error}); offline? Put the file at {path}") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        bad = path.replace(path.with_name(path.name + ".bad"))
        raise ValueError(f"{path} does not have SHA-256 {sha256[:12]}...: moved to {bad}, not used")
    return path


def check_digits(pe, longest, args):
    if pe == "seqpe" and longest > args.base ** args.digits:
        raise ValueError(f"--digits {args.digits} write {args.base ** args.digits} positions, and {longest} "
                         f"are needed: use --digits {digits_needed(longest - 1, args.base)}")


def read_text(data):
    """--data -> training and validation text."""
    if data in ("python", "recall"):
        # Whole files; those whose name has a checksum that ends in 0 are for validation.
        text = {True: "", False: ""}
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text[zlib.crc32(file.name.encode()) % 10 == 0] += file.read_text(encoding="utf-8")
        return text[False], text[True]
    if data == "shakespeare":
        data = download(SHAKESPEARE, Path(__file__).resolve().parent / "data" / "tinyshakespeare.txt",
                        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
    try:
        text = Path(data).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--data {data}: not a UTF-8 text file") from None
    except OSError as error:
        raise ValueError(f"--data {data}: {error.strerror}; "
                         "give python, recall, shakespeare or a file") from None
    return text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]


class Text:
    """Next-character prediction, scored on the same last characters with more and more context."""
    tables = {"loss": "nats per character (perplexity) with a context of"}
    n_evaluated = 64        # windows of validation text in a score

    def __init__(self, args, about=None, read=True):
        self.args = args
        train, val = read_text(args.data) if read else ("", "")
        self.about = about or sorted(set(train + val))      # what a checkpoint has to know of its data
        self.lengths = [args.block_size * 2 ** i for i in range(5)]     # of contexts: 1x to 16x
        if not read:
            return
        if len(self.about) < 2 or min(len(train), len(val)) <= args.block_size:
            raise ValueError(f"--data {args.data}: {len(train + val)} characters, {len(self.about)} "
                             f"different ones, are too few for --block-size {args.block_size}")
        self.train, self.val = self.encode(train), self.encode(val)
        self.encode(args.sample or "")      # a prompt that cannot be read is said before training, not after
        if self.lengths[-1] >= len(val):
            self.lengths = [T for T in self.lengths if T < len(val)]
            print(f"{len(val)} characters of validation text: scored at context lengths {self.lengths} only")

    def encode(self, text):
        if unknown := set(text) - set(self.about):
            raise ValueError(f"characters outside the vocabulary: {''.join(sorted(unknown))!r}")
        index = {c: i for i, c in enumerate(self.about)}
        return torch.tensor([index[c] for c in text])

    def model(self, pe):
        args = self.args
        check_digits(pe, self.lengths[-1], args)
        return GPT(GPTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, pe=pe,
                             fusion=args.fusion, n_digits=args.digits, base=args.base, pe_width=args.pe_width,
                             spread=args.spread, block_size=args.block_size, vocab_size=len(self.about)))

    def batch(self, generator):
        """(B, T + 1) characters of training text."""
        T = self.args.block_size
        start = torch.randint(len(self.train) - T, (self.args.batch_size, 1), generator=generator)
        return self.train[start + torch.arange(T + 1)]

    def loss(self, model, batch, positions=None):
        """positions: (B, T, 1) or None."""
        batch = batch.to(self.args.device)
        return model(batch[:, :-1], batch[:, 1:], None if positions is None else positions.squeeze(-1))[1]

    def windows(self, T):
        """(n_evaluated, T + 1) characters of validation text, which end at the same places for every T."""
        ends = torch.linspace(self.lengths[-1] + 1, len(self.val), self.n_evaluated,
                              dtype=torch.float64).long()
        return self.val[ends.unsqueeze(1) + torch.arange(-T - 1, 0)]

    @torch.no_grad()
    def predict(self, model, text):
        """The logits (N, L, vocab_size) of the last L = block_size characters of text (N, T + 1)."""
        batches = text[:, :-1].to(self.args.device).split(max(1, 16384 // text.size(1)))
        # The table has nothing to say beyond its last position: it is stretched.
        stretch = model.config.pe == "learned"
        return torch.cat([model(b, interpolate=stretch)[0][:, -self.args.block_size:] for b in batches]).cpu()

    def score(self, model, T):
        """The loss on the last block_size characters of T, in nats per character."""
        text = self.windows(T)
        logits = self.predict(model, text)
        return F.cross_entropy(logits.flatten(0, 1), text[:, -self.args.block_size:].flatten()).item()

    def validate(self, model):
        return self.score(model, self.args.block_size)

    def evaluate(self, model):
        """{table: {context length: score}}."""
        return {"loss": {T: self.score(model, T) for T in self.lengths}}

    def format(self, loss):
        return f"{loss:.3f} ({math.exp(loss):.2f})"

    def show(self, model):
        """A sample longer than the training context, where the encoding can, and SeqPE's picture."""
        prompt = self.args.sample or ("\n" if "\n" in self.about else self.about[0])
        longest = min(2 * self.args.block_size, model.pe.max_position or math.inf)
        idx = self.encode(prompt).unsqueeze(0).to(self.args.device)
        generator = torch.Generator(self.args.device).manual_seed(self.args.seed)
        idx = model.generate(idx, max(0, longest - len(prompt)), 0.8, top_k=20, generator=generator)
        print("\n" + "".join(self.about[i] for i in idx[0].tolist()))
        if model.encoder:
            print(f"\nafter training\n{heat_map(model.encoder)}")


class Recall(Text):
    """Records such as @ab=731 in real text; at its end their keys are asked for again, in another order."""
    tables = {"exact_match": "% of answers right with a context of",
              "exact_match_by_distance": "% right in the longest context, the record at most this far back"}
    n_evaluated = 256
    size, n_records = len("@ab=731"), 3
    questions = torch.arange(-n_records * size, 0).view(n_records, size)    # where they are, from the end
    answers = questions[:, -3:]

    def __init__(self, args, about=None, read=True):
        if args.block_size < 2 * self.questions.numel():
            raise ValueError(f"--data recall needs a --block-size of at least {2 * self.questions.numel()}")
        super().__init__(args, about, read)

    def ask(self, text, generator, n_different=n_records):
        """Write records over text (B, T + 1) at random places, and the same in another order over its end.

        n_different, an integer or (B, 1): how many of the records are, the others repeat them.
        """
        B, n, size = len(text), self.n_records, self.size
        letters, digits, at, equals = map(self.encode, (string.ascii_lowercase, string.digits, "@", "="))
        key = torch.rand(B, 26 * 26, generator=generator).topk(n).indices                   # distinct
        value = torch.randint(1000, (B, n), generator=generator)
        records = torch.stack([at.expand(B, n), letters[key // 26], letters[key % 26], equals.expand(B, n),
                               digits[value // 100], digits[value // 10 % 10], digits[value % 10]], dim=-1)
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

    def loss(self, model, batch, positions=None):
        """That of the answers and the language model's: an answer's character counts 15 times any other's."""
        batch = batch.to(self.args.device)
        positions = None if positions is None else positions.squeeze(-1)
        logits, loss = model(batch[:, :-1], batch[:, 1:], positions)
        answers = F.cross_entropy(logits[:, self.answers].flatten(0, 2), batch[:, self.answers].flatten())
        return answers + loss

    def windows(self, T):
        return self.ask(super().windows(T), torch.Generator().manual_seed(T))

    def right(self, model, text):
        """Which answers greedy decoding gets right, all three digits: (N, n_records).

        All of the text is read at once: the likeliest digit after right ones is what decoding would write.
        """
        logits = self.predict(model, text)
        return (logits[:, self.answers].argmax(-1) == text[:, self.answers]).all(-1).float() * 100

    def score(self, model, T):
        return self.right(model, self.windows(T)).mean().item()

    def evaluate(self, model):
        scores = {T: self.score(model, T) for T in self.lengths[:-1]}
        text = self.windows(self.lengths[-1])
        right = self.right(model, text)
        scores[self.lengths[-1]] = right.mean().item()
        # How far back the records of the longest context stood, which is where their keys first occur.
        keys = text[:, self.questions[:, :4]]                                       # (N, n_records, 4)
        found = (text.unfold(1, 4, 1).unsqueeze(1) == keys.unsqueeze(2)).all(-1)    # (N, n_records, T - 2)
        distance = text.size(1) + self.questions[:, 0] - found.int().argmax(-1)     # (N, n_records)
        bin = torch.bucketize(distance, torch.tensor(self.lengths))
        by_distance = {T: right[bin == i].mean().item()
                       for i, T in enumerate(self.lengths) if (bin == i).any()}
        return {"exact_match": scores, "exact_match_by_distance": by_distance}

    def format(self, percent):
        return f"{percent:.1f}"


def text_task(args, about=None, read=True):
    return (Recall if args.data == "recall" else Text)(args, about, read)


# ------------------------------------------------------------------------------------------------------------
# Training


class Run:
    """One encoding's training: its settings, and its files."""

    def __init__(self, pe, args):
        self.pe, self.out = pe, args.out
        self.settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS} | {"pe": pe}
        self.stem = f"{Path(args.data).stem}-{pe}-seed{args.seed}"
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:6]
        self.progress, self.final, self.record = (args.out / f"{self.stem}-{digest}{end}"
                                                  for end in (".part.pt", ".pt", ".json"))

    def resume(self):
        """The checkpoint to go on from, or None."""
        for path in (self.progress, self.final):    # a final one without a record was not evaluated
            if path.exists():
                return load_checkpoint(path)
        if others := sorted(self.out.glob(f"{self.stem}-*.part.pt"), key=os.path.getmtime):
            theirs = load_checkpoint(others[-1])["settings"]
            different = [f"{k} is {theirs.get(k)} there and {v} here" for k, v in self.settings.items()
                         if theirs.get(k) != v]
            raise ValueError(f"--resume: {others[-1]} has other arguments: {'; '.join(different)}")
        print(f"{self.pe}: nothing to resume, starting from step 0")


def write_file(path, data):
    """Write beside path, flush to disk, then move into place: path is never half written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; what was there before is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: checkpoint[key] for key in CHECKPOINT}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception:       # whatever a damaged or foreign file makes the unpickler say
        raise ValueError(f"{path}: not a checkpoint of this script (truncated, foreign or older)") from None


def restore(model, checkpoint):
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise ValueError("the checkpoint is of another version of this model") from None


def learning_rate(step, warmup, args, of_seqpe):
    """First 2e-3 falling to 0 for SeqPE alone; then up in 5 % of the steps, by a cosine to a tenth."""
    if step < warmup:
        return 2e-3 * (1 - step / warmup) if of_seqpe else 0.0
    done, peak = (step - warmup) / args.steps, args.lr * (args.pe_lr if of_seqpe else 1.0)
    return peak * min(1.0, 20 * (done + 1 / args.steps)) * (0.55 + 0.45 * math.cos(math.pi * done))


def training_loss(task, model, forward, data, step, warmup, args):
    """The loss of one step: the encoder's regularisers alone at first, then with the model's own loss."""
    encoder, shape = model.encoder, model.window
    weights = [args.contrastive_weight, args.distill_weight]
    if step < warmup:       # nothing to disturb yet: L_delta at full weight, and four times the groups
        return position_regularizers(encoder, shape, float(weights[0] > 0), weights[1], n_groups=16)
    positions = None
    if encoder and torch.rand(()) < args.shift_prob:
        # Eight windows for the sequences to share, as each costs the encoder a reading of T positions.
        n_pieces = torch.randint(1, args.pieces + 1, ()).item()
        positions = place_windows(shape, 8, encoder.max_position, n_pieces)             # (8, T, n_dim)
        positions = positions[torch.arange(args.batch_size) % 8]                        # (B, T, n_dim)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        loss = task.loss(forward, task.batch(data), positions)
    return loss + position_regularizers(encoder, shape, *weights) if encoder else loss


def train(task, run, args, stop):
    """Train one encoding; returns the model, or None when told to stop."""
    torch.manual_seed(args.seed)
    data = torch.Generator().manual_seed(args.seed)     # the same batches for every encoding
    model = task.model(run.pe).to(args.device)
    optimizer = model.configure_optimizers(args.lr)
    # SeqPE's gradient is clipped apart from the model's, as either may be much the larger.
    parts = {}
    for group in optimizer.param_groups:
        parts.setdefault(group["of_seqpe"], []).extend(group["params"])
    warmup = args.pe_warmup if model.encoder and (args.contrastive_weight or args.distill_weight) else 0
    total, first, kept = warmup + args.steps, 0, 0
    if args.resume and (checkpoint := run.resume()):
        restore(model, checkpoint)
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"]["torch"])
        data.set_state(checkpoint["random"]["data"])
        if args.device == "cuda" and checkpoint["random"]["cuda"]:
            torch.cuda.set_rng_state_all(checkpoint["random"]["cuda"])
        first = checkpoint["step"]
        print(f"{run.pe}: going on from step {first}")
    elif run.progress.exists():
        kept = load_checkpoint(run.progress)["step"]
        print(f"{run.progress} holds step {kept} of this command, and will until this run is further; "
              "--resume would go on from there")
    if model.encoder and first == 0:
        print(f"before training\n{heat_map(model.encoder)}\n")

    def save(path):
        random = {"torch": torch.get_rng_state(), "data": data.get_state(),
                  "cuda": torch.cuda.get_rng_state_all() if args.device == "cuda" else []}
        buffer = io.BytesIO()
        torch.save(dict(settings=run.settings, step=step + 1, model=model.state_dict(), random=random,
                        optimizer=optimizer.state_dict(), about=task.about), buffer)
        write_file(path, buffer.getvalue())

    forward, shown, step = torch.compile(model) if args.compile else model, {}, first - 1
    bar = tqdm(range(first, total), initial=first, total=total, desc=run.pe, mininterval=1)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, warmup, args, group["of_seqpe"])
        loss = training_loss(task, model, forward, data, step, warmup, args)
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(part, 1.0) for part in parts.values()]
        optimizer.step()
        optimizer.zero_grad()
        stopping = bool(stop) and step + 1 < total
        if not (step % 20 == 19 or step + 1 == total or stopping):
            continue                    # .item() would wait for a GPU
        if not all(math.isfinite(x.item()) for x in (loss, *norms)):
            raise ValueError(f"{run.pe}: the loss is not finite at step {step + 1}, try a smaller --lr; the "
                             f"last good checkpoint, if there was one, is {run.progress}")
        shown["loss"] = f"{loss.item():.3f}"
        if step >= warmup and step % 100 == 99:
            shown["val"] = f"{task.validate(model):.3f}"
        bar.set_postfix(shown)
        if (step % 100 == 99 or stopping) and kept < step + 1 < total:
            save(run.progress)
        if stopping:
            bar.close()
            print(f"{run.pe}: stopped at step {step + 1} of {total}; --resume goes on from there")
            return None
    save(run.final)
    run.progress.unlink(missing_ok=True)
    return model


# ------------------------------------------------------------------------------------------------------------
# What is shown at the end


def table(task, results):
    """results {encoding: {table: {column: score}}} as text, a small chart at the end of each row."""
    lines = []
    for key, title in task.tables.items():
        rows = {name: tables[key] for name, tables in results.items()}
        scores = [score for row in rows.values() for score in row.values()]
        low, high = min(scores), max(scores)
        columns = "".join(f"{column:>15}" for column in next(iter(rows.values())))
        lines += [title, " " * 12 + columns]
        for name, row in rows.items():
            cells = "".join(f"{task.format(score):>15}" for score in row.values())
            bars = (round(7 * (score - low) / (high - low or 1)) for score in row.values())
            chart = "".join("▁▂▃▄▅▆▇█"[bar] * 2 for bar in bars)
            lines.append(f"{name:<12}{cells}   {chart}")
        lines.append("")
    return "\n".join(lines)


@torch.no_grad()
def heat_map(encoder, size=32):
    """e_i . e_j as a picture, in the training window and across the middle of what the digits can write."""
    pictures, size = [], min(size, encoder.max_position)
    for start in sorted({0, (encoder.max_position - size) // 2}):       # one where that is all there is
        e = encoder(torch.arange(start, start + size).unsqueeze(-1).expand(-1, encoder.n_dim)).cpu()
        dots = e @ e.T
        grey = ((dots - dots.min()) / (dots.max() - dots.min())).tolist()
        lines = [f"{f'e_i . e_j, {start} to {start + size - 1}':<{size}}"]
        for upper, lower in zip(grey[0::2], grey[1::2]):
            if sys.stdout.isatty():     # two pixels a character: an upper half block, and what is behind it
                lines.append("".join(f"\x1b[38;5;{232 + round(23 * u)};48;5;{232 + round(23 * v)}m▀"
                                     for u, v in zip(upper, lower)) + "\x1b[0m")
            else:
                lines.append("".join(" ░▒▓█"[round(2 * (u + v))] for u, v in zip(upper, lower)))
        pictures.append(lines)
    return "\n".join(map("  ".join, zip(*pictures)))


def run_all(make_task, args):
    """Train each encoding of args.pe, or look at args.load; returns {encoding: {table: {column: score}}}."""
    torch.set_float32_matmul_precision("high")      # TF32 on CUDA
    torch.set_flush_denormal(True)                  # a CPU is slow with the far tails of a softmax
    if args.load:
        checkpoint = load_checkpoint(args.load)
        if checkpoint["settings"].keys() - vars(args).keys():
            raise ValueError(f"{args.load}: a checkpoint of another script, or another version of this one")
        vars(args).update(checkpoint["settings"])
        task = make_task(args, checkpoint["about"], read=args.eval)
        model = task.model(args.pe).to(args.device)
        restore(model, checkpoint)
        results = {args.pe: task.evaluate(model)} if args.eval else {}
        if args.eval:
            print(table(task, results))
        task.show(model)
        return results

    args.out.mkdir(parents=True, exist_ok=True)
    task, results, stop = make_task(args), {}, []
    for pe in args.pe:
        task.model(pe)      # what is wrong with any of them is said before the first is trained

    def on_interrupt(*_):   # the first Ctrl-C ends the step, the second the program
        stop.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    for run in [Run(pe, args) for pe in args.pe]:
        if args.resume and run.record.exists():
            tables = json.loads(run.record.read_text())["results"]
            results[run.pe] = {key: {int(column): score for column, score in row.items()}
                               for key, row in tables.items()}
            print(f"{run.record} is finished")
            continue
        began = time.time()
        model = train(task, run, args, stop)
        if model is None:
            break
        results[run.pe] = task.evaluate(model)
        print(f"{'replacing' if run.record.exists() else 'writing'} {run.record}")
        record = {"pe": run.pe, "data": args.data, "seed": args.seed, "device": args.device,
                  "arguments": run.settings, "seconds": round(time.time() - began),
                  "results": results[run.pe]}
        write_file(run.record, json.dumps(record, indent=1).encode())
        task.show(model)
    signal.signal(signal.SIGINT, before)
    if results:
        print("\n" + table(task, results))
    if stop:
        sys.exit(130)
    return results


# ------------------------------------------------------------------------------------------------------------
# Speed and memory


def jobs(pe, args):
    """What --bench measures of an encoding: {name: function}."""
    task = Text(args, about=[chr(i) for i in range(128)], read=False)
    task.batch = lambda generator: torch.randint(128, (args.batch_size, args.block_size + 1))
    model = task.model(pe).to(args.device)
    optimizer, encoder, shape = model.configure_optimizers(args.lr), model.encoder, model.window

    def step(shift_prob):
        settings = argparse.Namespace(**vars(args) | {"shift_prob": shift_prob})
        training_loss(task, model, model, None, 0, 0, settings).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def read(T):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            model(torch.zeros(1, T, dtype=torch.long, device=args.device), interpolate=pe == "learned")

    def sample():
        sample_groups(4, 32, 1, args.digits, args.base, device=args.device)
        place_windows(shape, 4, encoder.max_position, device=args.device)

    found = {"step": partial(step, 0), "shifted step": partial(step, 1)}
    if encoder:
        found |= {"of it a window": lambda: encoder(window(shape)).sum().backward(),
                  "of it regularisers": lambda: position_regularizers(encoder, shape).backward(),
                  "of it sampling": sample}
    # 1x, 2x, 4x ... the training length
    lengths = [args.block_size * 2 ** i for i in range(args.bench.bit_length())]
    return found | {f"read {T}": partial(read, T) for T in lengths}


def milliseconds(work):
    began = timer()     # torch's, which waits until a GPU has done what it was given
    work()
    return 1000 * (timer() - began)


def peak_memory(pe, name, args):
    """MiB that a job takes in a fresh process: on the GPU, or resident on Linux; elsewhere nan."""
    def resident(key):
        found = re.search(rf"{key}:\s*(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
        return int(found[1]) / 1024 if found else math.nan

    work, cuda = jobs(pe, args)[name], args.device == "cuda"
    before = 0 if cuda else resident("VmRSS")
    work()
    return torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else resident("VmHWM") - before


def bench(args, n_rounds=5):
    """Median times and peak memory of the encodings, with ratios to rope's: {measure: {encoding: value}}.

    "of it" stands before parts of SeqPE's step, which come as shares of it and have no memory of their own.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    # Enough for what is read here, and for the 16 times block_size that every Text's model is made for.
    args.digits = max(args.digits, digits_needed(max(16, args.bench) * args.block_size - 1, args.base))
    works = [(pe, name, work) for pe in args.pe for name, work in jobs(pe, args).items()]
    found = {}
    for _ in tqdm(range(n_rounds + 1), desc="time"):    # round by round: a drifting machine favours none
        for pe, name, work in works:
            found.setdefault(f"{name}, ms", {}).setdefault(pe, []).append(milliseconds(work))
    found = {name: {pe: statistics.median(times[1:]) for pe, times in row.items()}
             for name, row in found.items()}
    found["step, characters/s"] = {pe: 1000 * args.batch_size * args.block_size / step
                                   for pe, step in found["step, ms"].items()}
    for pe, name, _ in tqdm([work for work in works if "of it" not in work[1]], desc="memory"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            found.setdefault(f"{name}, MiB", {})[pe] = fresh.submit(peak_memory, pe, name, args).result()
    print(" " * 24 + "".join(f"{pe:>18}" for pe in args.pe))
    for name, row in found.items():
        compared = {}
        if name.startswith("of it"):
            compared = {pe: f" ({value / found['step, ms'][pe]:.1%})" for pe, value in row.items()}
        elif row.get("rope"):
            compared = {pe: f" ({value / row['rope']:.2f}x)" for pe, value in row.items()}
        cells = [f"{row[pe]:.1f}{compared.get(pe, '')}" if pe in row else "" for pe in args.pe]
        print(f"{name:<24}" + "".join(f"{cell:>18}" for cell in cells))
    record = {"device": args.device, "results": found}
    write_file(args.out / "bench.json", json.dumps(record, indent=1).encode())
    return found


def run_script(main):
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv=None):
    parser = Parser(__doc__, ["seqpe", "rope", "alibi", "sinusoidal", "learned", "nope"])
    parser.add_argument("--data", default="python", help="python, recall, shakespeare, or a text file")
    parser.add_argument("--block-size", type=at_least(1), default=128, help="training length, in characters")
    parser.add_argument("--sample", metavar="PROMPT", help="text to go on from at the end")
    parser.add_argument("--bench", nargs="?", type=at_least(1), const=64, metavar="N",
                        help="measure speed and memory instead, reading to N (64) times the training length")
    args = parser.parse(argv, PRESETS)
    if args.bench:
        return bench(args)
    return run_all(text_task, args)


if __name__ == "__main__":
    run_script(main)

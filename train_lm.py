"""Train a small GPT on characters, then read on far beyond the length it was trained on.

    python train_lm.py --pe seqpe               real text, Python's own standard library: no download
    python train_lm.py --pe all --seed 0,1,2    every encoding, three times each, in one table and one chart
    python train_lm.py --recipe paper           SeqPE as in the paper; optimiser and sizes stay ours
    python train_lm.py --data recall            records in that text, asked for again at its end
    python train_lm.py --data FILE              other text, in UTF-8
    python train_lm.py --resume                 go on after Ctrl-C or a crash, or show what is finished
"""

import argparse
import io
import json
import math
import os
import statistics
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer
from tqdm import tqdm

from seqpe import (FUSIONS, GPT, GPTConfig, count_bias, place_windows, position_regularizers,
                   pretrain_encoder, window)

# ---- Arguments --------------------------------------------------------------------------------------------

OPTIONS = {     # our default, that of --recipe paper where it is another, least, most, what it is
    "steps": (800, 1, 10 ** 7, "training steps"),
    "batch_size": (32, 1, 65536, "sequences in a step"),
    "lr": (3e-3, 0, 10, "peak learning rate"),
    "n_layer": (4, 1, 128, "layers of the model"),
    "n_head": (4, 1, 128, "heads of a layer, in the model and in SeqPE's encoder"),
    "n_embd": (128, 1, 8192, "width of the model"),
    "shift_prob": (0.5, 0.1, 0, 1, "share of the eight windows of a step that are at random places"),
    "shift_whole": (0, 1, 0, 1, "1: all eight are (the paper: 16 of a pool), or none"),
    "pieces": (4, 1, 1, 64, "most pieces, apart from each other, of such a window"),
    "distill_weight": (0.1, 0, 1e3, "weight of L_OOD"),
    "distill_shifted": (1, 0, 0, 1, "0: no L_OOD in steps that have shifted windows"),
    "paper_groups": (0, 1, 0, 1, "1: groups and students as many, and compared, as in the paper"),
    "pretrain_steps": (1000, 0, 0, 10 ** 6, "steps of SeqPE's encoder alone before the model's first"),
    "head_norm": (6.0, 0.0, 0, 1e3, "length of e_p in each head; 0: as it comes"),
    "diagonal_maps": (1, 0, 0, 1, "how the maps W start; 1: diagonal, 0: N(0, 0.02)"),
    "pe_embd": (64, 0, 0, 8192, "size of e_p and width of its encoder, for scalar; 0: the model's"),
    "pe_dropout": (0.0, 0.1, 0, 0.9, "dropout in SeqPE's encoder"),
}


def parse(argv, doc, tasks, options, more={}):
    """The arguments of a script, and its task: of tasks, {--data: class}, the first is for files, too."""
    first, cuda, options = next(iter(tasks.values())), torch.cuda.is_available(), options | OPTIONS
    parser = argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pe", default="seqpe", help=f"a comma list of {', '.join(first.encodings)}; or all")
    add("--data", default=next(iter(tasks)), help=f"{', '.join(tasks)}, or a file")
    add("--recipe", choices=("ours", "paper"), default="ours", help="how SeqPE is trained")
    add("--seed", default="0", help="of everything random, or a comma list of them")
    add("--resume", action="store_true", help="go on with what --out holds of this command, or show it again")
    add("--out", type=Path, default=Path("out"), help="folder of checkpoints and results (%(default)s)")
    add("--split", choices=("test", "val"), default="test", help="what tables score; settings: on val")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    for flag, keywords in more.items():
        add(flag, **keywords)
    for name, (*values, _, _, text) in options.items():
        if title := {"steps": "model and training", "shift_prob": "SeqPE and its training"}.get(name):
            add = parser.add_argument_group(title).add_argument
        add("--" + name.replace("_", "-"), type=type(values[0]), help=f"{text} (%(default).4g)")
    add("--fusion", choices=FUSIONS, default="scalar", help="how SeqPE enters the model (%(default)s)")
    # Defaults depend on --data and --recipe, which are looked up first; -h would end that.
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    Task, paper = tasks.get(known.data, first), known.recipe == "paper"
    defaults = {name: row[paper and len(row) > 4] for name, row in options.items()}
    parser.set_defaults(**defaults | Task.defaults | (Task.paper if paper else {}))
    args = parser.parse_args(argv)
    args.pe = first.encodings if args.pe == "all" else list(dict.fromkeys(args.pe.split(",")))
    if unknown := set(args.pe) - set(first.encodings):
        parser.error(f"unknown --pe {min(unknown)!r}; known: {', '.join(first.encodings)}; or all alone")
    if not all(seed.isdecimal() and int(seed) <= 2 ** 32 for seed in args.seed.split(",")):
        parser.error(f"--seed must be integers from 0 to 2 ** 32, not {args.seed!r}")
    args.seed = list(dict.fromkeys(map(int, args.seed.split(","))))
    for name, (*_, least, most, _) in options.items():
        if not least <= (value := getattr(args, name)) <= most:
            parser.error(f"--{name.replace('_', '-')} must be from {least} to {most}, not {value}")
    if args.device == "cuda" and not cuda:
        parser.error("torch finds no cuda here; try --device cpu")
    args.device = "cuda" if cuda and args.device != "cpu" else "cpu"
    args.options = {name: getattr(args, name) for name in ("recipe", *options, "fusion")}
    said = [(name, value) for name, value in args.options.items() if value != parser.get_default(name)]
    args.name = "".join(f"-{name.replace('_', '-')}={value}".removesuffix(".0") for name, value in said)
    return args, Task


# ---- Data -------------------------------------------------------------------------------------------------

def read_text(data):
    """--data -> {split: text}."""
    if data in ("python", "recall"):
        # Whole files, by the last digit of a checksum of their name: 1 is for the test, 0 for validation.
        text = {"train": "", "val": "", "test": ""}
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            split = {0: "val", 1: "test"}.get(zlib.crc32(file.name.encode()) % 10, "train")
            with suppress(OSError, UnicodeDecodeError):         # a link to nowhere, for one
                text[split] += file.read_text(encoding="utf-8")
        return text
    try:
        text = Path(data).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {data}: not python, recall or a text file in UTF-8: {error}") from None
    cuts = len(text) * 8 // 10, len(text) * 9 // 10
    return {"train": text[:cuts[0]], "val": text[cuts[0]:cuts[1]], "test": text[cuts[1]:]}


class Text:
    """Next-character prediction, scored on the same last characters with more and more context."""
    encodings = ["seqpe", "rope", "alibi", "sinusoidal", "learned", "nope"]
    defaults, paper = {}, {}            # in place of OPTIONS'; the same for --recipe paper alone
    tables = {"Loss in nats per character (lower is better), by characters of context": {}}     # for score()
    form, n_evaluated = ".3f", 64       # of a score: how it is written, and of how many windows of text

    def __init__(self, args):
        text = read_text(args.data)
        self.args, self.characters = args, sorted(set().union(*text.values()))
        self.sizes = [args.block_size * 2 ** i for i in range(args.reach.bit_length())]     # 1x, 2x, 4x, ...
        if len(self.characters) < 2 or min(map(len, text.values())) <= self.sizes[-1]:
            raise ValueError(f"--data {args.data}: {[*map(len, text.values())]} characters of "
                             f"{len(self.characters)} kinds are too few to read {self.sizes[-1]} at once")
        self.splits = {name: self.encode(split) for name, split in text.items()}
        self.prompt = self.encode(args.sample or ("\n" if "\n" in self.characters else self.characters[0]))
        self.checksum = zlib.crc32("".join(text.values()).encode())

    def encode(self, text):
        index = {character: i for i, character in enumerate(self.characters)}
        if unknown := set(text) - set(index):
            raise ValueError(f"--sample: characters that the data has not: {''.join(sorted(unknown))[:20]!r}")
        return torch.tensor([index[character] for character in text])

    def model(self, pe):
        found = vars(self.args) | dict(pe=pe, vocab_size=len(self.characters), max_position=self.sizes[-1])
        return GPT(GPTConfig(**{f.name: found[f.name] for f in fields(GPTConfig) if f.name in found}))

    def batch(self, generator):
        """(B, T + 1) characters of training text."""
        T, text = self.args.block_size, self.splits["train"]
        start = torch.randint(len(text) - T, (self.args.batch_size, 1), generator=generator)
        return text[start + torch.arange(T + 1)]

    def signals(self, model, windows, which):
        """What the encoding tells each layer: sequence b has the positions of windows[which[b]]."""
        signals = None if windows is None else model.pe(windows, which)
        if signals and self.args.pieces > 1:
            bias = count_bias(windows.to(self.args.device))[which]                          # (B, 1, T, T)
            signals = [signal._replace(bias=bias) for signal in signals]
        return signals

    def loss(self, model, batch, windows, which):
        batch = batch.to(self.args.device)
        return model(batch[:, :-1], batch[:, 1:], self.signals(model, windows, which))[1]

    def windows(self, split, T):
        """(n_evaluated, T + 1) characters of a split, which end at the same places for every T."""
        text = self.splits[split]
        ends = torch.linspace(self.sizes[-1] + 1, len(text), self.n_evaluated, dtype=torch.float64).long()
        return text[ends.unsqueeze(1) + torch.arange(-T - 1, 0)]

    @torch.no_grad()
    def predict(self, model, text):
        """The logits (n, L, vocab_size) of the last L = block_size characters of text (n, T + 1)."""
        T, L, signals = text.size(1) - 1, self.args.block_size, None
        if model.config.pe == "learned" and T > L:      # the table has nothing to say beyond: it is stretched
            signals = model.pe.interpolate((T,))
        batches = text[:, :-1].to(self.args.device).split(max(1, 16384 // (T + 1)))
        return torch.cat([model(batch, signals=signals)[0][:, -L:].cpu()
                          for batch in tqdm(batches, f"reading {T}", leave=False, delay=5)])

    def score(self, model, split, T):
        """The loss on the last block_size characters of T, in nats per character."""
        text = self.windows(split, T)
        logits = self.predict(model, text)
        return F.cross_entropy(logits.flatten(0, 1), text[:, -self.args.block_size:].flatten()).item()

    @torch.no_grad()
    def show(self, model, seed, n_likeliest=20, temperature=0.8):
        """A sample longer than the training context, where the encoding can."""
        longest = min(2 * self.args.block_size, model.pe.max_position or math.inf)
        idx = self.prompt[-max(1, longest // 2):].unsqueeze(0).to(self.args.device)
        generator = torch.Generator(self.args.device).manual_seed(seed)
        while idx.size(1) < longest:        # each token costs a pass over all of the text
            logits, tokens = model(idx)[0][:, -1].float().topk(min(n_likeliest, len(self.characters)))
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, tokens.gather(-1, chosen)], dim=1)
        print("\n" + "".join(self.characters[i] for i in idx[0]))


class Recall(Text):
    """Records such as @ab=731 in real text; at its end their keys are asked for again, in another order."""
    defaults = dict(steps=1200, lr=1e-3)
    tables = {"Right answers in %, by characters of context": {}}
    form, n_evaluated = ".1f", 256
    size, n_records = len("@ab=731"), 3
    questions = torch.arange(-n_records * size, 0).view(n_records, size)    # where they are, from the end
    answers = questions[:, -3:]

    def __init__(self, args):
        if args.block_size < 2 * self.questions.numel():
            raise ValueError(f"--data recall needs a --block-size of at least {2 * self.questions.numel()}")
        super().__init__(args)

    def ask(self, text, generator, n_different=n_records):
        """Write n_different records over text (B, T + 1), and the same in another order over its end."""
        B, n, size, abc = len(text), self.n_records, self.size, "abcdefghijklmnopqrstuvwxyz"
        keys = torch.rand(B, 26 * 26, generator=generator).topk(n).indices.flatten()    # distinct in a text
        values = torch.randint(1000, (B, n), generator=generator).flatten()
        records = self.encode("".join(f"@{abc[key // 26]}{abc[key % 26]}={value:03}"
                                      for key, value in zip(keys.tolist(), values.tolist())))
        rows = torch.arange(B).unsqueeze(-1)
        records = records.view(B, n, size)[rows, torch.arange(n) % n_different]
        # Sorted places in a text without the records become places that do not overlap in one with them.
        place = torch.randint(text.size(1) - 2 * n * size + 1, (B, n), generator=generator).sort().values
        place = (place + size * torch.arange(n)).unsqueeze(-1) + torch.arange(size)         # (B, n, size)
        text = text.scatter(1, place.flatten(1), records.flatten(1))
        text[:, self.questions] = records[rows, torch.rand(B, n, generator=generator).argsort(1)]
        return text

    def batch(self, generator):
        # Copying is learned from texts with a record that is repeated, finding the right one from the others.
        n_different = torch.randint(1, self.n_records + 1, (self.args.batch_size, 1), generator=generator)
        return self.ask(super().batch(generator), generator, n_different)

    def loss(self, model, batch, windows, which):
        """That of the answers and the language model's: an answer's character counts 15 times any other's."""
        batch = batch.to(self.args.device)
        logits, loss = model(batch[:, :-1], batch[:, 1:], self.signals(model, windows, which))
        return loss + F.cross_entropy(logits[:, self.answers].flatten(0, 2), batch[:, self.answers].flatten())

    def score(self, model, split, T):
        """The share of answers, in %, of which greedy decoding would write all three digits."""
        text = self.ask(self.windows(split, T), torch.Generator().manual_seed(T))
        logits = self.predict(model, text)
        right = (logits[:, self.answers].argmax(-1) == text[:, self.answers]).all(-1)       # (n, n_records)
        return right.float().mean().item() * 100


# ---- Files ------------------------------------------------------------------------------------------------

def path_of(args, names, seeds, end):
    """Where a file of this command lies. A long name is cut; a checksum of it keeps commands apart."""
    name = f"{Path(args.data).name}-{names}{args.name}-seed{','.join(map(str, seeds))}"
    if len(name.encode()) > 150:
        name = name.encode()[:140].decode(errors="ignore") + f"-{zlib.crc32(name.encode()):08x}"
    return args.out / (name + end)


def write_file(path, data):
    """Write to a name of this process alone, then move into place: path is never half written."""
    path = Path(os.path.realpath(path))     # a symbolic link stays one; resolve() fails where links circle
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())     # or a power cut may leave the name without the content
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path, settings, model=None, optimizer=None, data=None):
    """The step of the checkpoint at path, of a run with our settings; with a model, it goes on from there."""
    try:
        if zipfile.ZipFile(path).testzip():         # torch does not look at the checksums
            raise ValueError
        found = torch.load(path, map_location="cpu", weights_only=True)
        theirs, step, (cpu, batches, *cuda) = found["settings"], int(found["step"]), found["random"]
        different = [name for name in settings if theirs[name] != settings[name]]
        if model and not different:
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
            torch.set_rng_state(cpu)
            data.set_state(batches)
            torch.cuda.set_rng_state_all(cuda)
    except Exception:       # whatever a damaged or foreign file makes zipfile and torch say
        raise ValueError(f"{path}: no checkpoint of this script, or damaged; use another --out") from None
    for name in different:
        raise ValueError(f"{path}: {name} is {theirs[name]} there, {settings[name]} here; use another --out")
    return step


# ---- Training ---------------------------------------------------------------------------------------------

def training_loss(task, model, batch, args):
    """The model's loss, and SeqPE's two. A step has eight windows of positions; some are at random places."""
    encoder, windows, which = model.pe.encoder, None, None
    chance = torch.rand(()).item() < args.shift_prob if args.shift_whole else args.shift_prob
    n_shifted = round(8 * chance)
    if encoder and n_shifted:
        windows = place_windows(model.shape, 8, encoder.max_position, args.pieces)          # (8, T, n_dim)
        windows[n_shifted:] = window(model.shape)
        which = (torch.arange(args.batch_size) * 8 + 7) // args.batch_size  # sequences share them, evenly
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        loss = task.loss(model, batch, windows, which)
    if not encoder:
        return loss, 0.0
    distill_weight = args.distill_weight if args.distill_shifted or not n_shifted else 0.0
    return loss, position_regularizers(encoder, model.shape, 0.1, distill_weight, paper=args.paper_groups)


def train(task, pe, seed, path, settings):
    """Train an encoding, or go on with it at path, where it is saved every 100 steps; returns the model."""
    args, first = task.args, 0
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(seed)          # the same batches for every encoding
    model = task.model(pe).to(args.device)
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    # ours: optimiser and rates. An encoding's gradient is clipped apart, as either may be much the larger.
    of_pe, of_model = [*model.pe.parameters()], [p for n, p in model.named_parameters() if n[:3] != "pe."]
    if path.exists():
        first = read_checkpoint(path, settings, model, optimizer, data)
        print(f"{path}: {'finished' if first == args.steps else f'going on from step {first}'}")
    elif model.pe.encoder and args.pretrain_steps:
        pretrain_encoder(model.pe.encoder, model.shape, args.pretrain_steps,
                         progress=lambda steps: tqdm(steps, "encoder"))

    bar = tqdm(range(first, args.steps), pe, args.steps, initial=first, mininterval=1)
    for step in bar:
        # Up in 5 % of the steps, then by a cosine to a tenth.
        done = step / args.steps
        rate = args.lr * min(1.0, 20 * (done + 1 / args.steps)) * (0.55 + 0.45 * math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        loss, regularizers = training_loss(task, model, task.batch(data), args)
        (loss + regularizers).backward()
        torch.nn.utils.clip_grad_norm_(of_model, 1.0)
        torch.nn.utils.clip_grad_norm_(of_pe, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step + 1 == args.steps:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise ValueError(f"{pe} at step {step + 1}: weights that are not finite; try a smaller --lr")
            random = [torch.get_rng_state(), data.get_state(), *torch.cuda.get_rng_state_all()]
            found = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), random=random)
            torch.save(found | dict(settings=settings, step=step + 1), buffer := io.BytesIO())
            write_file(path, buffer.getbuffer())
            val = task.score(model.eval(), "val", task.sizes[0])
            bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{val:{task.form}}")
            model.train()
    return model.eval()


# ---- What is shown at the end -----------------------------------------------------------------------------

def over_seeds(rows):
    """{encoding: [scores of each seed]} -> {encoding: [(mean, standard deviation) of each score]}"""
    return {pe: [(statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0)
                 for each in zip(*seeds)] for pe, seeds in rows.items()}


def table(title, form, columns, rows):
    """As Markdown, mean ± standard deviation."""
    lines = [title, "", f"{'encoding':<10}" + "".join(f" | {column:>11}" for column in columns),
             "---" + " | ---" * len(columns)]
    for pe, row in over_seeds(rows).items():
        cells = [f"{mean:{form}}" + f"±{deviation:{form}}" * (len(rows[pe]) > 1) for mean, deviation in row]
        lines.append(f"{pe:<10}" + "".join(f" | {cell:>11}" for cell in cells))
    return "\n".join([*lines, ""])


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 250"><style>
text { font: 12px sans-serif; fill: #59636e } polyline, path { fill: none; stroke: #818b98 }
.us polyline, .us path { stroke: #d1242f; stroke-width: 3 } .us text { fill: #d1242f; font-weight: bold }
.tick { stroke: #d1d9e0 } @media (prefers-color-scheme: dark) { text { fill: #9198a1 }
.us polyline, .us path { stroke: #ff7b72 } .us text { fill: #ff7b72 } .tick { stroke: #3d444d } }</style>
<path class="tick" d="M36,40H216M36,120H216M36,200H216"/>"""


def chart(title, columns, rows):
    """The same as an SVG: a line through the means, a bar for the deviation, SeqPE's in red."""
    found, (title, _, axis) = over_seeds(rows), title.partition(", by ")
    ends = [score for row in found.values() for mean, d in row for score in (mean - d, mean + d)]
    low, high = (0, 100) if "%" in title else (min(ends), max(ends))
    scale, step, name_at = 160 / (high - low or 1), 180 / max(1, len(columns) - 1), math.inf
    texts = [("start", 8, 16, title), ("middle", 126, 244, axis)]
    texts += [("middle", 36 + i * step, 222, column) for i, column in enumerate(columns)]
    texts += [("end", 30, y + 4, f"{low + (200 - y) / scale:.3g}") for y in (40, 120, 200)]
    svg = [SVG, *(f'<text text-anchor="{end}" x="{x}" y="{y}">{text}</text>' for end, x, y, text in texts)]
    for n, (pe, row) in enumerate(sorted(found.items(), key=lambda each: each[1][-1])):         # from below
        points = [(36 + i * step, 200 - scale * (mean - low), scale * d) for i, (mean, d) in enumerate(row)]
        name_at = min(points[-1][1] + 4, name_at - 13)                                      # names make way
        line = " ".join(f"{x:.0f},{y:.1f}" for x, y, _ in points)
        bars = "".join(f"M{x + 2 * n - 5:.0f},{y - d:.1f}V{y + d:.1f}" for x, y, d in points)   # side by side
        svg.append(f'<g class="{"us" * (pe == "seqpe")}"><polyline points="{line}"/><path d="{bars}"/>'
                   f'<text x="222" y="{name_at:.1f}">{pe.replace("nope", "none")}</text></g>')
    return "\n".join([*svg, "</svg>", ""])


@torch.no_grad()
def heat_map(encoder, size=32):
    """e_i . e_j as pictures: in the training window, and across the longest carry of the digits."""
    size = min(size, encoder.max_position)
    carry = min(encoder.base ** (encoder.n_digits - 1) - size // 2, encoder.max_position - size)
    pictures = []
    for start in sorted({0, max(0, carry)}):        # one, where that is all there is
        e = encoder(torch.arange(start, start + size).unsqueeze(-1).expand(-1, encoder.n_dim)).cpu()
        dots = e @ e.T
        grey = (dots - dots.min()) / (dots.max() - dots.min()).clamp(min=1e-9)
        shade = (2 * (grey[:-1:2] + grey[1::2])).round().int()      # a character is two rows high
        title = f"e_i . e_j, {start} to {start + size - 1}".ljust(size)
        pictures.append([title, *("".join(" ░▒▓█"[i] for i in row) for row in shade)])
    return "\n".join(map("  ".join, zip(*pictures)))


# ---- All of it --------------------------------------------------------------------------------------------

def run_all(Task, args):
    """Train each encoding with each seed -> {title of a table: {encoding: [scores of each seed]}}"""
    torch.set_float32_matmul_precision("high")      # TF32 on CUDA
    torch.set_flush_denormal(True)                  # a CPU is slow with the far tails of a softmax
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()    # a folder that cannot be written to is found out now
    task, results = Task(args), {}
    runs = [(pe, seed, path_of(args, pe, [seed], ".pt"), {**args.options, "pe": pe, "seed": seed,
            "checksum of the data": task.checksum}) for seed in args.seed for pe in args.pe]
    for pe, _, path, settings in runs:  # what is wrong with any is said before the first is trained
        with torch.device("meta"):      # no memory is needed yet
            task.model(pe)
        if path.exists() and not args.resume:
            raise ValueError(f"{path} exists: --resume goes on or shows it again, another --out starts anew")
        if path.exists():
            read_checkpoint(path, settings)
    try:
        for pe, seed, path, settings in runs:
            model = train(task, pe, seed, path, settings)
            for title, how in task.tables.items():
                scores = [task.score(model, args.split, size, **how) for size in task.sizes]
                results.setdefault(title, {}).setdefault(pe, []).append(scores)
            task.show(model, seed)
            if model.pe.encoder:
                print(heat_map(model.pe.encoder))
    finally:        # when stopped, too: what is finished
        for title, rows in results.items():
            print("\n" + table(title, task.form, task.sizes, rows))
    names, end = ",".join(args.pe), "-val" * (args.split == "val")
    for i, (title, rows) in enumerate(results.items()):
        svg, record = chart(title, task.sizes, rows), {"columns": task.sizes, title: rows, **vars(args)}
        path = path_of(args, names, args.seed, end + f"-{i}" * (i > 0) + ".svg")
        write_file(path, svg.encode())
        write_file(path.with_suffix(".json"), json.dumps(record, default=str).encode())
    return results


def bench(args, n_rounds=5):
    """Median milliseconds of a training step and of reading, and as multiples of the last encoding's."""
    args.reach = 64
    task, data = Text(args), torch.Generator().manual_seed(0)
    models = {pe: task.model(pe).to(args.device) for pe in args.pe}
    for T in (0, *task.sizes[::2]):         # a step of training, then reading T characters
        times = {pe: [] for pe in models}
        for _ in range(n_rounds + 1):       # in turns: a drifting machine favours none; the first warms up
            for pe, model in models.items():
                began = timer()
                if T:
                    task.predict(model, torch.zeros(1, T + 1, dtype=torch.long))
                else:
                    sum(training_loss(task, model, task.batch(data), args)).backward()
                    model.zero_grad()
                times[pe].append(1000 * (timer() - began))
        median = {pe: statistics.median(each[1:]) for pe, each in times.items()}
        print(f"{f'read {T}' if T else 'step':<12}" + "".join(
            f"{pe:>12} {t:9.1f} ms ({t / median[args.pe[-1]]:.2f}x)" for pe, t in median.items()))


def main(argv=None):
    options = {"block_size": (128, 1, 65536, "training length, in characters"),
               "reach": (16, 1, 1024, "how many times that length is read at the end")}
    more = {"--sample": dict(metavar="PROMPT", help="what the sample at the end goes on from"),
            "--bench": dict(action="store_true", help="measure speed instead")}
    args, Task = parse(argv, __doc__, {"python": Text, "recall": Recall}, options, more)
    return bench(args) if args.bench else run_all(Task, args)


def run_script(main):
    """What goes wrong is one line."""
    sys.stdout.reconfigure(errors="replace")        # a console may not have all characters
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        said = str(error).partition("\n")[0] or "out of memory: try smaller sizes"
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped: --resume goes on from the last of every 100 steps", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)

"""Train a small GPT on characters, then read on far beyond the length it was trained on.

    python train_lm.py --pe seqpe               real text, Python's own standard library: no download
    python train_lm.py --pe all --seed 0,1,2    every encoding, three times each, in one table and one chart
    python train_lm.py --recipe paper           our small version of the paper's recipe for SeqPE
    python train_lm.py --data recall            records in it, asked for again (1,200 steps, rate 0.001)
    python train_lm.py --resume                 go on after Ctrl-C or a crash; show what is finished again
"""

import argparse
import io
import json
import math
import os
import statistics
import sys
import sysconfig
import zlib
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer
from tqdm import tqdm

from seqpe import GPT, training_windows, window

# ---- Arguments --------------------------------------------------------------------------------------------

OPTIONS = {     # ours, the value of --recipe paper, the least one or all there are, what it is
    "steps": (800, 800, 1, "training steps"),
    "batch_size": (32, 32, 1, "sequences in a step"),
    "lr": (3e-3, 3e-3, 0, "peak learning rate"),
    "n_layer": (4, 4, 1, "layers of the model"),
    "n_head": (4, 4, 1, "heads of a layer, in the model and in SeqPE's encoder"),
    "n_embd": (128, 128, 1, "width of the model"),
    "windows": ("counted", "whole", ("counted", "torn", "whole", "plain"), "how positions move in training"),
    "pieces": (4, 4, range(1, 10), "the most pieces of a torn window, along each axis"),
    "shift_prob": (0.5, 0.1, 0, "share of a step's eight windows that move, in eighths"),
    "shift_steps": (0, 1, (0, 1), "1: all eight in that share of the steps, without L_OOD"),
    "contrast_weight": (0.1, 0.1, 0, "weight of L_delta"),
    "distill_weight": (0.1, 0.1, 0, "weight of L_OOD"),
    "paper_groups": (0, 1, (0, 1), "1: both losses as in the paper: groups, students, heads, the mean"),
    "pretrain_steps": (1000, 0, 0, "steps of SeqPE's encoder alone before the model's first"),
    "head_norm": (6.0, 0.0, 0, "length of e_p in each head; 0: as it comes"),
    "diagonal_maps": (1, 0, (0, 1), "how the maps W start; 1: diagonal, 0: N(0, 0.02)"),
    "pe_embd": (64, 128, 1, "size of e_p and width of its encoder, for the fusion scalar"),
    "pe_dropout": (0.0, 0.1, 0, "dropout in SeqPE's encoder"),
    "fusion": ("scalar", "scalar", ("scalar", "mul"), "how SeqPE enters the model"),
}


def parse(argv, doc, tasks, options, bench=False):
    """-> args, and the class of tasks, {--data: class}, that --data names; the first is for files, too."""
    first, options = next(iter(tasks.values())), OPTIONS | options
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pe", default="seqpe", help=f"a comma list of {', '.join(first.encodings)}; or all")
    add("--data", default=next(iter(tasks)), type=os.path.expanduser, help=f"{', '.join(tasks)}, or a file")
    add("--recipe", choices=("ours", "paper"), default=argparse.SUPPRESS, help="how SeqPE is trained (ours)")
    add("--seed", default="0", help="of weights and batches, or a comma list of them (0)")
    add("--resume", action="store_true", help="go on from what --out has; show a finished run again")
    add("--out", default="out", type=os.path.expanduser, help="folder of checkpoints and results (out)")
    add("--split", choices=("test", "val"), default="test", help="of the tables (test); settings: on val")
    add("--device", choices=devices, default=devices[-1], help=f"({devices[-1]})")
    if bench:
        add("--bench", action="store_true", help="measure speed instead")
    for name, (*row, least, text) in options.items():
        value = first.defaults.get(name, row)[0]
        add("--" + name.replace("_", "-"), type=type(value), default=argparse.SUPPRESS,
            choices=None if least in (0, 1) else least, help=f"{text} ({value})")
    args = parser.parse_args(argv)          # has only those options that are given
    given = {name: getattr(args, name) for name in ("recipe", *options) if name in args}
    args.name = "".join(f"-{name}={value}" for name, value in given.items()).replace("_", "-")
    Task, paper = tasks.get(args.data, first), given.get("recipe") == "paper"
    args.settings = {name: Task.defaults.get(name, row)[paper] for name, row in options.items()} | given
    vars(args).update(args.settings)
    for name, (*_, least, _) in options.items():
        most = 1 if name in ("shift_prob", "pe_dropout") else 10 ** 12
        if least in (0, 1) and not least <= args.settings[name] <= most:
            parser.error(f"--{name.replace('_', '-')} must be from {least} to {most}")
    args.pe, args.seed = (list(dict.fromkeys(each.split(","))) for each in (args.pe, args.seed))
    args.pe = first.encodings if args.pe == ["all"] else args.pe
    if unknown := set(args.pe) - set(first.encodings):
        parser.error(f"unknown --pe {min(unknown)!r}; known: {', '.join(first.encodings)}; or all alone")
    if not all(seed.isdecimal() and int(seed) < 2 ** 32 for seed in args.seed):
        parser.error(f"--seed must be integers from 0 to 2 ** 32 - 1, not {','.join(args.seed)!r}")
    return args, Task


def settings_of(args, pe, sides):
    """What GPT and ViT share. sides: of the window in training, and of those that are read."""
    # On plain windows a table has no rows that training never meets: it is stretched.
    longest = sides[0] if pe == "learned" and args.windows == "plain" else sides[-1]
    names = ["n_layer", "n_head", "n_embd"]
    names += ["fusion", "pe_embd", "head_norm", "diagonal_maps", "pe_dropout"] * (pe == "seqpe")
    return {"pe": pe, "max_position": longest} | {name: args.settings[name] for name in names}


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
    defaults = {}                       # (ours, the paper's) in place of OPTIONS'
    tables = {"Loss in nats per character (lower is better), by characters of context": {}}     # for score()
    form, n_evaluated, least = ".3f", 64, 1     # of a score; excerpts it is of; the least --block-size

    def __init__(self, args):
        if args.block_size < self.least or args.reach.bit_count() != 1:
            raise ValueError(f"--block-size must be {self.least} or more, and --reach a power of two")
        text = read_text(args.data)
        self.args, self.characters = args, sorted(set().union(*text.values()))
        self.sizes = [args.block_size * 2 ** i for i in range(args.reach.bit_length())]     # 1x, 2x, 4x, ...
        if min(map(len, text.values())) <= self.sizes[-1]:
            raise ValueError(f"--data {args.data}: too short to read {self.sizes[-1]} characters at once")
        self.splits = {name: self.encode(split) for name, split in text.items()}
        self.checksum = zlib.crc32("".join(text.values()).encode())

    def encode(self, text):
        index = {character: i for i, character in enumerate(self.characters)}
        return torch.tensor([index[character] for character in text])

    def model(self, pe):
        return GPT(len(self.characters), self.sizes[0], **settings_of(self.args, pe, self.sizes))

    def batch(self, generator):
        """(B, T + 1) characters of training text."""
        T, text = self.args.block_size, self.splits["train"]
        start = torch.randint(len(text) - T, (self.args.batch_size, 1), generator=generator)
        return text[start + torch.arange(T + 1)]

    def loss(self, model, batch, windows, which):
        """Logits and loss. Sequence b has the positions windows[which[b]]; without windows 0 to T - 1."""
        batch = batch.to(self.args.device)
        signals = None if windows is None else model.pe(windows, which, self.args.windows == "counted")
        return model(batch[:, :-1], batch[:, 1:], signals)

    def excerpts(self, split, T):
        """(n_evaluated, T + 1) characters of a split, which end at the same places for every T."""
        text = self.splits[split]
        ends = torch.linspace(self.sizes[-1] + 1, len(text), self.n_evaluated, dtype=torch.float64).long()
        return text[ends.unsqueeze(1) + torch.arange(-T - 1, 0)]

    @torch.no_grad()
    def predict(self, model, text):
        """The logits (n, L, vocab_size) of the last L = block_size characters of text (n, T + 1)."""
        T, L = text.size(1) - 1, self.args.block_size
        signals = model.pe.interpolate((T,)) if T > model.pe.max_position else None     # a table, stretched
        batches = text[:, :-1].to(self.args.device).split(max(1, 16384 // (T + 1)))
        return torch.cat([model(batch, signals=signals)[0][:, -L:].cpu()
                          for batch in tqdm(batches, f"reading {T}", leave=False, delay=5)])

    def score(self, model, split, T):
        """The loss on the last block_size characters of T, in nats per character."""
        text = self.excerpts(split, T)
        logits = self.predict(model, text)
        return F.cross_entropy(logits.flatten(0, 1), text[:, -self.args.block_size:].flatten()).item()

    @torch.no_grad()
    def show(self, model):
        """A sample longer than the training context, where the encoding can; it goes on from other text."""
        longest = min(2 * self.args.block_size, model.pe.max_position)
        idx = self.splits["val"][:1 + longest // 8].unsqueeze(0).to(self.args.device)
        while idx.size(1) < longest:        # each token costs a pass over all of the text
            probabilities = (model(idx)[0][:, -1] / 0.8).softmax(-1)
            idx = torch.cat([idx, torch.multinomial(probabilities, 1)], dim=1)
        print("\n" + "".join(self.characters[i] for i in idx[0]))


class Recall(Text):
    """Records such as @ab=731 in real text; at its end their keys are asked for again, in another order."""
    defaults = dict(steps=(1200, 1200), lr=(1e-3, 1e-3))
    tables = {"Right answers in %, by characters of context": {}}
    form, n_evaluated = ".1f", 256
    size, n_records = len("@ab=731"), 3
    questions = torch.arange(-n_records * size, 0).view(n_records, size)    # where they are, from the end
    answers, least = questions[:, -3:], 2 * questions.numel()

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
        # Texts with one record, repeated, teach to copy; those with several, to find the right one.
        n_different = torch.randint(1, self.n_records + 1, (self.args.batch_size, 1), generator=generator)
        return self.ask(super().batch(generator), generator, n_different)

    def loss(self, model, batch, windows, which):
        """The text's, and the mean over the answers' 9 characters: they weigh 1 + T / 9 times any other."""
        batch = batch.to(self.args.device)
        logits, loss = super().loss(model, batch, windows, which)
        asked = logits[:, self.answers].flatten(0, 2), batch[:, self.answers].flatten()
        return logits, loss + F.cross_entropy(*asked)

    def score(self, model, split, T):
        """The share of answers, in %, of which greedy decoding would write all three digits."""
        text = self.ask(self.excerpts(split, T), torch.Generator().manual_seed(T))
        logits = self.predict(model, text)
        right = (logits[:, self.answers].argmax(-1) == text[:, self.answers]).all(-1)       # (n, n_records)
        return right.float().mean().item() * 100


# ---- Training ---------------------------------------------------------------------------------------------

def training_loss(task, model, batch):
    """The model's loss, and SeqPE's two. Every encoding but nope gets the same kind of windows."""
    args, windows, which = task.args, None, None
    share = torch.rand(()).item() < args.shift_prob if args.shift_steps else args.shift_prob
    n_moved = 0 if args.windows == "plain" or model.encoding == "nope" else round(8 * share)
    if n_moved:
        windows, which = training_windows(model.shape, args.batch_size, model.pe.max_position, n_moved,
                                          1 if args.windows == "whole" else args.pieces)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        _, loss = task.loss(model, batch, windows, which)
    if model.encoding != "seqpe":
        return loss, 0.0
    distill_weight = 0.0 if args.shift_steps and n_moved else args.distill_weight
    return loss, model.pe.loss(args.contrast_weight, distill_weight, paper=args.paper_groups)


def write_file(path, data):
    """path is never half written, and a full disk leaves what was there."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def resume(path, settings, model, optimizer, data):
    """Go on from the checkpoint at path: the number of steps that are done."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if different := [name for name in settings if found["settings"].get(name) != settings[name]]:
            raise ValueError(f"it has another {', '.join(different)}")
        step, (cpu, batches, *cuda) = found["step"], found["random"]
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        torch.set_rng_state(cpu)
        data.set_state(batches)
        torch.cuda.set_rng_state_all(cuda[:torch.cuda.device_count()])
    except Exception as error:      # whatever a damaged or foreign file makes torch say
        raise ValueError(f"{path}: cannot go on from it, use another --out: {error}") from None
    print(f"{path}: {'finished' if step == settings['steps'] else f'going on from step {step}'}")
    return step


def train(task, pe, seed, path):
    """Train an encoding, or go on with it at path, where it is saved every 100 steps; returns the model."""
    args, first = task.args, 0
    settings = args.settings | {"pe": pe, "seed": seed, "checksum of the data": task.checksum}
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(seed)          # the same batches for every encoding
    model = task.model(pe).to(args.device)
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)        # ours, as are the rates
    # An encoding's gradient is clipped apart, as SeqPE's is in the paper (there at 5, and W with the model).
    of_pe, of_model = [*model.pe.parameters()], [p for n, p in model.named_parameters() if n[:3] != "pe."]
    if path.exists():
        first = resume(path, settings, model, optimizer, data)
    elif pe == "seqpe":
        model.pe.pretrain(args.pretrain_steps, progress=lambda steps: tqdm(steps, "encoder"))
    bar = tqdm(range(first, args.steps), pe, args.steps, initial=first, mininterval=1)
    for step in bar:
        done = step / args.steps        # the rate goes up in 5 % of the steps, then by a cosine to a tenth
        rate = args.lr * min(1.0, 20 * (done + 1 / args.steps)) * (0.55 + 0.45 * math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        loss, regularizers = training_loss(task, model, task.batch(data))
        (loss + regularizers).backward()
        torch.nn.utils.clip_grad_norm_(of_model, 1.0)
        torch.nn.utils.clip_grad_norm_(of_pe, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step + 1 == args.steps:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise ValueError(f"{pe} at step {step + 1}: weights that are not finite; try a smaller --lr")
            random = [torch.get_rng_state(), data.get_state(), *torch.cuda.get_rng_state_all()]
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), random=random,
                            settings=settings, step=step + 1), buffer := io.BytesIO())
            write_file(path, buffer.getbuffer())
            val = task.score(model.eval(), "val", task.sizes[0])
            bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{val:{task.form}}")
            model.train()
    return model.eval()


# ---- All of it --------------------------------------------------------------------------------------------

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 250"><style>text { font: 12px sans-serif;
fill: #59636e } path { fill: none; stroke: #818b98 } .us path { stroke: #d1242f; stroke-width: 3 }
.us text { fill: #d1242f; font-weight: bold } .tick { stroke: #d1d9e0 } @media (prefers-color-scheme: dark) {
text { fill: #9198a1 } .us path { stroke: #ff7b72 } .us text { fill: #ff7b72 } .tick { stroke: #3d444d } }
</style><path class="tick" d="M36,40H216M36,120H216M36,200H216"/>"""


def report(title, form, columns, rows, path):
    """Print rows, {encoding: [scores of each seed]}, as a table in Markdown; write it and a chart to path."""
    found = {pe: [(statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0)
                  for each in zip(*seeds)] for pe, seeds in rows.items()}
    print(f"\n{title}\n\nencoding  " + "".join(f" | {column:>11}" for column in columns))
    print("---" + " | ---" * len(columns))
    for pe, row in found.items():
        cells = [f"{mean:{form}}" + f"±{d:{form}}" * (len(rows[pe]) > 1) for mean, d in row]
        print(f"{pe:<10}" + "".join(f" | {cell:>11}" for cell in cells))
    write_file(f"{path}.json", json.dumps({"columns": columns, title: rows}).encode())

    title, _, axis = title.partition(", by ")       # the chart: lines through the means, bars of deviation
    ends = [end for row in found.values() for mean, d in row for end in (mean - d, mean + d)]
    low, high = (0, 100) if "%" in title else (min(ends), max(ends))
    scale, step, name_at = 160 / (high - low or 1), 180 / max(1, len(columns) - 1), 0
    texts = [("start", 8, 16, title), ("middle", 126, 244, axis)]
    texts += [("middle", 36 + i * step, 222, column) for i, column in enumerate(columns)]
    texts += [("end", 30, y + 4, f"{low + (200 - y) / scale:.3g}") for y in (40, 120, 200)]
    svg = [SVG, *(f'<text text-anchor="{end}" x="{x}" y="{y}">{text}</text>' for end, x, y, text in texts)]
    for n, (pe, row) in enumerate(sorted(found.items(), key=lambda each: -each[1][-1][0])):     # from above
        points = [(36 + i * step, 200 - scale * (mean - low), scale * d) for i, (mean, d) in enumerate(row)]
        name_at = max(name_at + 13, min(points[-1][1] + 4, 217 - 13 * (len(found) - n)))    # names make way
        line = "M" + "L".join(f"{x:.0f},{y:.1f}" for x, y, _ in points)
        bars = "".join(f"M{x + 2 * n - 5:.0f},{y - d:.1f}V{y + d:.1f}" for x, y, d in points)   # side by side
        svg.append(f'<g class="{"us" * (pe == "seqpe")}"><path d="{line}{bars}"/>'
                   f'<text x="222" y="{name_at:.1f}">{pe.replace("nope", "none")}</text></g>')
    write_file(f"{path}.svg", "\n".join([*svg, "</svg>", ""]).encode())


def run_all(Task, args):
    """Train each encoding with each seed -> {title of a table: {encoding: [scores of each seed]}}"""
    out, task, results = Path(args.out), Task(args), {title: {} for title in Task.tables}
    out.mkdir(parents=True, exist_ok=True)
    name = lambda pe, seed: out / f"{Path(args.data).name}-{pe}{args.name}-seed{seed}"
    shown = f"{name(','.join(args.pe), ','.join(args.seed))}{'-val' * (args.split == 'val')}"
    runs = [(pe, int(seed), Path(f"{name(pe, seed)}.pt")) for seed in args.seed for pe in args.pe]
    Path(f"{shown}-0.json.tmp").unlink(missing_ok=True)     # the longest name: an error, if it is too long
    for pe, _, path in runs:        # what is wrong with any model is found out now, too
        model = task.model(pe)
        model.pe(window(model.shape))
        if path.exists() and not args.resume:
            raise ValueError(f"{path} exists: --resume goes on or shows it again, another --out starts anew")
    for pe, seed, path in runs:
        model = train(task, pe, seed, path)
        task.show(model)
        for i, (title, how) in enumerate(task.tables.items()):      # what is finished, after each run
            scores, rows = [task.score(model, args.split, T, **how) for T in task.sizes], results[title]
            rows.setdefault(pe, []).append(scores)
            report(title, task.form, task.sizes, rows, f"{shown}-{i}")
    return results


def bench(task, n_rounds=5):
    """Median milliseconds of the passes of a training step, and of reading; as multiples of the last's."""
    args, data = task.args, torch.Generator().manual_seed(0)
    models = {pe: task.model(pe).to(args.device) for pe in args.pe}
    for T in (0, *task.sizes[::2]):         # a step of training, then reading T characters
        times = {pe: [] for pe in models}
        for pe, model in [*models.items()] * (n_rounds + 1):    # in turns: a drifting machine favours none
            began = timer()
            if T:
                task.predict(model.eval(), torch.zeros(1, T + 1, dtype=torch.long))
            else:
                sum(training_loss(task, model.train(), task.batch(data))).backward()
                model.zero_grad()
            times[pe].append(1000 * (timer() - began))
        median = {pe: statistics.median(each[1:]) for pe, each in times.items()}        # the first warms up
        print(f"{f'read {T}' if T else 'step':<12}" + "".join(
            f"{pe:>12} {t:9.1f} ms ({t / median[args.pe[-1]]:.2f}x)" for pe, t in median.items()))


def main(argv=None):
    options = {"block_size": (128, 128, 1, "training length, in characters"),
               "reach": (16, 16, 1, "how many times that length is read at the end, a power of two")}
    args, Task = parse(argv, __doc__, {"python": Text, "recall": Recall}, options, bench=True)
    return bench(Task(args)) if args.bench else run_all(Task, args)


def run_script(main):
    """Run it with our settings of torch; what goes wrong is one line."""
    torch.set_float32_matmul_precision("high")      # TF32 on CUDA
    torch.set_flush_denormal(True)                  # a CPU is slow with the far tails of a softmax
    if isinstance(sys.stdout, io.TextIOWrapper):    # not so in a notebook
        sys.stdout.reconfigure(errors="replace")    # a console may not have all characters
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0] or "out of memory: try smaller sizes"
        if isinstance(error, RuntimeError) and "memory" not in said and "overflow" not in said:
            raise
        argparse.ArgumentParser(usage=argparse.SUPPRESS).error(said)
    except KeyboardInterrupt:
        print("\nstopped: --resume goes on from the last of every 100 steps", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)

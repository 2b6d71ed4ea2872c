"""Train a small ViT on images of one size, then show it the same images enlarged, up to three times.

    python train_vit.py --pe seqpe              handwritten digits, which lie in data/: no download
    python train_vit.py --pe all --seed 0,1,2   every encoding, three times each, in one table and one chart
    python train_vit.py --recipe paper          our small version of the paper's recipe for SeqPE
    python train_vit.py --data FILE.npz         other images: uint8 `images`, integer `labels`
    python train_vit.py --resume                go on after Ctrl-C or a crash; show what is finished again
"""

import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from seqpe import ENCODINGS, RoPE, Transformer, window
from train_lm import parse, run_all, run_script, settings_of

MAGNIFICATIONS = (1, 1.5, 2, 2.5, 3)

# ---- The model --------------------------------------------------------------------------------------------

class RoPEMixed(RoPE):
    """Heo et al. 2024: the angle of a pair comes of both coordinates, at frequencies learned per head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Each half of the pairs looks along an axis, the two at right angles, at random in each head.
        angle = 2 * math.pi * torch.rand(self.n_layer, self.n_head, 1)
        angle = angle + torch.tensor([0, math.pi / 2])
        axes = torch.stack([angle.cos(), angle.sin()], dim=2).unsqueeze(-1)         # (n_layer, H, 2, 2, 1)
        # ours: from RoPE's theta of 100, and with weight decay; Heo et al. 10, and without.
        of_one = super().frequency(None)[0, 0, 0, :self.head_dim // 4]
        self.learned = nn.Parameter((axes * of_one).flatten(-2))                    # (n_layer, H, 2, D/2)

    def frequency(self, device):
        return self.learned.float()


ENCODINGS["rope_mixed"] = RoPEMixed


class ViT(Transformer):
    """An image classifier (Dosovitskiy et al. 2021) of seqpe.py's blocks; image_size is that of training.
    ours: eps is 1e-5 and residual projections start small, as in GPT-2; the authors have 1e-6 and 0.02.
    """

    def __init__(self, image_size=32, patch_size=4, n_channels=1, n_classes=10, n_embd=96, **kwargs):
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not divisible by patch_size={patch_size}")
        super().__init__((image_size // patch_size,) * 2, causal=False, n_embd=n_embd, **kwargs)
        self.patch_size = patch_size
        self.patches = nn.Conv2d(n_channels, n_embd, patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.randn(n_embd) * 0.02)
        self.head = nn.Linear(n_embd, n_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, targets=None, signals=None, kept=None):
        """images: (B, n_channels, height, width) -> logits (B, n_classes) and, with targets (B,), the loss.
        kept: (n,) indices of the only patches to look at, of the T there are. signals: model.pe(positions) of
        these patches, or other such; by default those of their places in the grid.
        """
        patch = self.patch_size
        if images.size(-2) % patch or images.size(-1) % patch:
            raise ValueError(f"an image of {tuple(images.shape[-2:])} is not divisible by patch_size={patch}")
        x = self.patches(images)                                                    # (B, C, h, w)
        places, x = window(x.shape[-2:]), x.flatten(2).transpose(1, 2)              # (T, 2), (B, T, C)
        if kept is not None:
            places, x = places[kept], x[:, kept]
        x = torch.cat([self.cls.expand(x.size(0), 1, -1), x], dim=1)
        logits = self.head(self.transform(x, self.pe(places) if signals is None else signals)[:, 0])
        return logits, None if targets is None else F.cross_entropy(logits, targets)


# ---- Data -------------------------------------------------------------------------------------------------

def read_images(data, size):
    """--data -> images (n, channels, height, width) as uint8, labels (n,)."""
    if data == "digits":
        path = Path(__file__).resolve().parent / "data" / "digits.csv.gz"
        table = np.loadtxt(path, np.uint8, delimiter=",")       # 64 pixels of 0 to 16, then the label
        images, labels = table[:, :64].reshape(-1, 8, 8) * 15, table[:, 64]
    else:
        try:
            with np.load(data) as arrays:
                images, labels = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
        except Exception as error:      # whatever a missing, damaged or foreign file makes numpy say
            raise ValueError(f"--data {data}: not digits, nor an .npz file with arrays `images` and `labels` "
                             f"that can be read: {error}") from None
    images = images[..., None] if images.ndim == 3 else images
    if (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size
            or len(images) < 9 or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(f"--data {data}: needs uint8 images (9 or more, height, width[, 1 or 3]), as many "
                         f"integer labels; has {images.dtype} {images.shape}; {labels.dtype} {labels.shape}")
    if not 0 <= labels.min() <= labels.max() < len(labels):
        raise ValueError(f"--data {data}: labels are {labels.min()} to {labels.max()}, but must be from 0 to "
                         f"below {len(labels)}, the number of images")
    if data != "digits":        # shuffled, then by label: so a class of nine or more is in every split
        order = np.random.default_rng(0).permutation(len(images))
        order = order[labels[order].argsort(kind="stable")]
        images, labels = images[order], labels[order]
    images = torch.from_numpy(images).movedim(-1, 1)
    if max(images.shape[-2:]) > size:       # once and for all, as training would skip pixels
        images = torch.cat([draw(each, size) for each in images.split(100)]).add(1).mul(127.5).round().byte()
    return images, torch.from_numpy(labels.astype(np.int64))


def draw(images, size):
    """uint8 images (B, channels, h, w) at size x size pixels, from -1 to 1."""
    images = F.interpolate(images.float() / 255, (size, size), mode="bicubic", antialias=True)
    return images.clamp(0, 1) * 2 - 1


def augment(images, size, generator):
    """The same, with a random zoom of 0.75 to 3 onto some part of them, turned by up to 15 degrees.
    The zoom covers the magnifications of the test: what a patch shows then, it has shown in training. Small
    zooms are the likelier, as little is left to recognise of a digit at 3.
    """
    B = len(images)
    u, v, x, y = torch.rand(4, B, generator=generator)
    zoom, angle = 0.75 * 4 ** u.square(), (v * 2 - 1) * math.radians(15)
    # The image is as wide as [-1, 1]; the part that is seen has 1 / zoom of its width.
    far = (1 - 1 / zoom).abs() + 0.1
    affine = torch.stack([angle.cos() / zoom, -angle.sin() / zoom, (x * 2 - 1) * far,
                          angle.sin() / zoom, angle.cos() / zoom, (y * 2 - 1) * far], dim=-1).view(B, 2, 3)
    grid = F.affine_grid(affine, (B, 1, size, size), align_corners=False)
    images = F.grid_sample(images.float() / 255, grid, mode="bicubic", align_corners=False)
    return images.clamp(0, 1) * 2 - 1


# ---- The task; training and tables are train_lm.py's ------------------------------------------------------

class Images:
    """Classification, scored on the same images enlarged to more and more patches."""
    encodings = ["seqpe", "rope", "rope_mixed", "sinusoidal", "learned", "nope"]
    defaults = dict(n_embd=(96, 96), steps=(4000, 4000), lr=(1e-3, 1e-3), pieces=(8, 8),
                    shift_prob=(0.25, 0.1), pe_embd=(32, 96), fusion=("scalar", "mul"))
    tables = {"Images recognised in %, the grid extended, by size in pixels": dict(interpolate=False),
              "Images recognised in %, the grid interpolated, by size in pixels": dict(interpolate=True)}
    form = ".1f"

    def __init__(self, args):
        if args.image_size < 2 * args.patch_size:
            raise ValueError("--image-size must be twice --patch-size or more")
        images, labels = read_images(args.data, args.image_size)
        # Of every nine images two are for the test, and one is for validation: for choosing settings.
        ninth = torch.arange(len(images)) % 9
        self.splits = {name: (images[of], labels[of]) for name, of in
                       (("train", (ninth > 0) & (ninth < 7)), ("val", ninth == 0), ("test", ninth > 6))}
        if unknown := set(labels.tolist()) - set(self.splits["train"][1].tolist()):
            raise ValueError(f"--data {args.data}: label {min(unknown)} is of too few images to train on any")
        self.args, self.about = args, (images.size(1), int(labels.max()) + 1)     # channels, classes
        self.sizes = [round(args.image_size * m / args.patch_size) * args.patch_size for m in MAGNIFICATIONS]
        self.checksum = zlib.crc32(labels.numpy(), zlib.crc32(images.contiguous().numpy()))

    def model(self, pe):
        sides = [size // self.args.patch_size for size in self.sizes]
        return ViT(self.args.image_size, self.args.patch_size, *self.about,
                   **settings_of(self.args, pe, sides))

    def batch(self, generator):
        """Images (B, channels, size, size), labels (B,), and indices (n,) of the patches to look at.

        ours: up to three quarters of the patches are left out (after PatchDropout, Liu et al. 2022).
        Attention that always meets the same number of them tends to fail among nine times as many.
        """
        images, labels = self.splits["train"]
        which = torch.randint(len(labels), (self.args.batch_size,), generator=generator)
        images = augment(images[which], self.args.image_size, generator)
        n_patches = (self.args.image_size // self.args.patch_size) ** 2
        n_kept = torch.randint(math.ceil(n_patches / 4), n_patches + 1, (), generator=generator)
        return images, labels[which], torch.randperm(n_patches, generator=generator)[:n_kept]

    def loss(self, model, batch, windows, which):
        images, labels, kept = batch
        signals = None if windows is None else model.pe(windows[:, kept], which)
        return model(images.to(self.args.device), labels.to(self.args.device), signals, kept)

    @torch.no_grad()
    def score(self, model, split, size, interpolate=False):
        """The share of images, in %, that are recognised."""
        right, (images, labels) = 0, self.splits[split]
        grid, signals = (size // self.args.patch_size,) * 2, None
        # A table of the training grid alone can only be interpolated: then both tables are equal.
        if (interpolate or grid[0] > model.pe.max_position) and grid != model.shape:
            signals = model.pe.interpolate(grid)
        for some in tqdm(torch.arange(len(labels)).split(100), f"{size} px", leave=False, delay=5):
            logits = model(draw(images[some], size).to(self.args.device), signals=signals)[0]
            right += (logits.argmax(-1).cpu() == labels[some]).sum().item()
        return 100 * right / len(labels)

    def show(self, model):
        """There is nothing to sample."""


def main(argv=None):
    options = {"image_size": (32, 32, 1, "training size, in pixels"),
               "patch_size": (4, 4, 1, "size of a patch, in pixels"),
               "windows": ("torn", "whole", ("torn", "whole", "plain"), "how positions move in training")}
    args, Task = parse(argv, __doc__, {"digits": Images}, options)
    return run_all(Task, args)


if __name__ == "__main__":
    run_script(main)

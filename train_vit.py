"""Train a small ViT on images of one size, then show it the same images enlarged, up to three times.

    python train_vit.py --pe seqpe              handwritten digits, which lie in data/: no download
    python train_vit.py --pe all --seed 0,1,2   every encoding, three times each, in one table and one chart
    python train_vit.py --recipe paper          SeqPE as in the paper; optimiser and sizes stay ours
    python train_vit.py --data FILE.npz         other images: uint8 `images`, integer `labels`
    python train_vit.py --resume                go on after Ctrl-C or a crash; show what is finished again

Against train_lm.py a position has two coordinates; what else differs for SeqPE is in Images.defaults.
"""

import math
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from seqpe import ENCODINGS, RoPE, Transformer, TransformerConfig, window
from train_lm import parse, run_all, run_script

MAGNIFICATIONS = (1, 1.5, 2, 2.5, 3)

# ---- The model --------------------------------------------------------------------------------------------

class RoPEMixed(RoPE):
    """Heo et al. 2024: the angle of a pair comes of both coordinates, at frequencies learned per head."""

    def __init__(self, config, shape, class_token=False):
        super().__init__(config, shape, class_token)
        if self.n_dim != 2:
            raise ValueError("rope_mixed is for images, whose positions have two coordinates")
        # Each half of the pairs looks along an axis, the two at right angles, at random in each head.
        angle = 2 * math.pi * torch.rand(config.n_layer, config.n_head, 1)
        angle = angle + torch.tensor([0, math.pi / 2])
        axes = torch.stack([angle.cos(), angle.sin()], dim=2).unsqueeze(-1)         # (n_layer, H, 2, 2, 1)
        of_one = super().frequency(None)[0, 0, 0, :self.head_dim // 4]
        self.learned = nn.Parameter((axes * of_one).flatten(-2))                    # (n_layer, H, 2, D/2)

    def frequency(self, device):
        return self.learned.float()


ENCODINGS["rope_mixed"] = RoPEMixed


@dataclass
class ViTConfig(TransformerConfig):
    image_size: int = 32        # the training size, in pixels; no limit of the model
    patch_size: int = 4
    n_channels: int = 1
    n_classes: int = 10


class ViT(Transformer):
    """An image classifier (Dosovitskiy et al. 2021) of seqpe.py's blocks, for images of any size."""

    def __init__(self, config):
        C, patch = config.n_embd, config.patch_size
        if config.image_size % patch:
            raise ValueError(f"image_size={config.image_size} is not divisible by patch_size={patch}")
        super().__init__(config, (config.image_size // patch,) * 2, causal=False)
        self.patches = nn.Conv2d(config.n_channels, C, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(C) * 0.02)
        self.head = nn.Linear(C, config.n_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, targets=None, signals=None, kept=None):
        """images: (B, n_channels, height, width) -> logits (B, n_classes) and, with targets (B,), the loss.

        kept: (n,) indices of the only patches to look at, of the T there are. signals: model.pe(positions) of
        these patches, or other such; by default those of their places in the grid.
        """
        patch = self.config.patch_size
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
        # 64 pixels of 0 to 16, then the label
        path = Path(__file__).resolve().parent / "data" / "digits.csv.gz"
        table = np.loadtxt(path, np.uint8, delimiter=",")
        images, labels = table[:, :64].reshape(-1, 8, 8) * 15, table[:, 64]
    else:
        try:
            with np.load(data, allow_pickle=False) as arrays:
                images, labels = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
        except FileNotFoundError:
            raise ValueError(f"--data {data}: no such file; give digits or an .npz file") from None
        except Exception:       # whatever a damaged or foreign file makes numpy say
            raise ValueError(f"--data {data}: not an .npz file with arrays `images` and `labels`") from None
    images = images[..., None] if images.ndim == 3 else images
    if (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size
            or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0
            or labels.max() >= min(len(labels), 10_000)):
        raise ValueError(f"--data {data}: images must be uint8, (n, height, width) or (n, height, width, 3), "
                         f"labels (n,) integers from 0 to below n and 10,000; they are {images.dtype} "
                         f"{images.shape} and {labels.dtype} {labels.shape}")
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
    zoom, angle, x, y = torch.rand(4, B, generator=generator)
    zoom, angle = 0.75 * 4 ** zoom.square(), (angle * 2 - 1) * math.radians(15)
    # The image is as wide as [-1, 1]; the part that is seen has 1 / zoom of its width.
    reach = (1 - 1 / zoom).abs() + 0.1
    affine = torch.stack([angle.cos() / zoom, -angle.sin() / zoom, (x * 2 - 1) * reach,
                          angle.sin() / zoom, angle.cos() / zoom, (y * 2 - 1) * reach], dim=-1).view(B, 2, 3)
    grid = F.affine_grid(affine, (B, 1, size, size), align_corners=False)
    images = F.grid_sample(images.float() / 255, grid, mode="bicubic", align_corners=False)
    return images.clamp(0, 1) * 2 - 1


# ---- The task; training and tables are train_lm.py's ------------------------------------------------------

class Images:
    """Classification, scored on the same images enlarged to more and more patches."""
    encodings = ["seqpe", "rope", "rope_mixed", "sinusoidal", "learned", "nope"]
    # For images ours is nearer to the paper's.
    defaults = dict(n_embd=96, steps=4000, lr=1e-3, shift_prob=0.1, shift_whole=1, pieces=1, pe_embd=0)
    paper = dict(fusion="mul")
    tables = {"Images recognised in %, the grid extended, by size in pixels": dict(interpolate=False),
              "Images recognised in %, the grid interpolated, by size in pixels": dict(interpolate=True)}
    form = ".1f"

    def __init__(self, args):
        images, labels = read_images(args.data, args.image_size)
        if len(images) < 9:
            raise ValueError(f"--data {args.data}: {len(images)} images are too few")
        # Of every nine images two are for the test, and one is for validation: for choosing settings.
        ninth = torch.arange(len(images)) % 9
        self.splits = {name: (images[of], labels[of]) for name, of in
                       (("train", (ninth > 0) & (ninth < 7)), ("val", ninth == 0), ("test", ninth > 6))}
        self.args, self.about = args, {"n_channels": images.size(1), "n_classes": int(labels.max()) + 1}
        self.sizes = [round(args.image_size * m / args.patch_size) * args.patch_size for m in MAGNIFICATIONS]
        self.checksum = zlib.crc32(labels.numpy(), zlib.crc32(images.contiguous().numpy()))

    def model(self, pe):
        longest = self.sizes[-1] // self.args.patch_size
        found = vars(self.args) | self.about | dict(pe=pe, max_position=longest)
        return ViT(ViTConfig(**{f.name: found[f.name] for f in fields(ViTConfig) if f.name in found}))

    def batch(self, generator):
        """Images (B, channels, size, size), labels (B,), and indices (n,) of the patches to look at.

        ours: a random share of the patches is left out in each step (after PatchDropout, Liu et al. 2022).
        Attention that always meets the same number of them tends to fail among nine times as many.
        """
        images, labels = self.splits["train"]
        which = torch.randint(len(labels), (self.args.batch_size,), generator=generator)
        images = augment(images[which], self.args.image_size, generator)
        n_patches = (self.args.image_size // self.args.patch_size) ** 2
        n_kept = torch.randint(math.ceil(self.args.keep * n_patches), n_patches + 1, (), generator=generator)
        return images, labels[which], torch.randperm(n_patches, generator=generator)[:n_kept]

    def loss(self, model, batch, windows, which):
        images, labels, kept = batch
        signals = None if windows is None else model.pe(windows[:, kept], which)
        return model(images.to(self.args.device), labels.to(self.args.device), signals, kept)[1]

    @torch.no_grad()
    def score(self, model, split, size, interpolate=False):
        """The share of images, in %, that are recognised. The learned table can only be interpolated."""
        right, (images, labels) = 0, self.splits[split]
        grid, signals = (size // self.args.patch_size,) * 2, None
        if (interpolate or model.config.pe == "learned") and grid != model.shape:
            signals = model.pe.interpolate(grid)
        for some in tqdm(torch.arange(len(labels)).split(100), f"{size} px", leave=False, delay=5):
            logits = model(draw(images[some], size).to(self.args.device), signals=signals)[0]
            right += (logits.argmax(-1).cpu() == labels[some]).sum().item()
        return 100 * right / len(labels)

    def show(self, model, seed):
        """There is nothing to sample."""


def main(argv=None):
    options = {"image_size": (32, 1, 4096, "training size, in pixels"),
               "patch_size": (4, 1, 4096, "size of a patch, in pixels"),
               "keep": (0.25, 1e-6, 1, "least share of patches in a training step")}
    args, Task = parse(argv, __doc__, {"digits": Images}, options)
    return run_all(Task, args)


if __name__ == "__main__":
    run_script(main)

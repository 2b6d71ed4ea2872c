"""Train a small ViT on images of one size, then show it the same images enlarged, up to three times.

    python train_vit.py --pe seqpe          handwritten digits, which lie in data/: no download
    python train_vit.py --pe all            every encoding in turn, on the same batches, in one table
    python train_vit.py --data cifar10      or --data FILE.npz: other images
    python train_vit.py --resume            go on after Ctrl-C, a crash or a closed laptop
    python train_vit.py --load out/FILE.pt --eval

Against train_lm.py, a position has two coordinates in place of one. Nothing else about SeqPE is different.
"""

import math
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from seqpe import ViT, ViTConfig
from train_lm import Parser, at_least, check_digits, download, heat_map, run_all, run_script

HERE = Path(__file__).resolve().parent
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MAGNIFICATIONS = (1, 1.5, 2, 2.5, 3)
DEFAULTS = dict(n_embd=96, steps=4000, lr=1e-3, pe_lr=0.3, shift_prob=0.1, pieces=1,
                digits=2, base=5)       # 5 ** 2 covers the 24 patches of 3x
PRESETS = {"cifar10": dict(n_layer=6, n_head=6, n_embd=384, pe_width=96, batch_size=256, steps=20000)}

# ------------------------------------------------------------------------------------------------------------
# Data


def read_images(data):
    """--data -> images (N, channels, height, width) as uint8, labels (N,), and which ones are the test's."""
    if data == "digits":
        path = HERE / "data" / "digits.csv.gz"
        # 64 pixels of 0 to 16, then the label
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
        return table[:, :64].view(-1, 1, 8, 8) * 15, table[:, 64].long(), None
    if data == "cifar10":
        path = download(CIFAR10, HERE / "data" / "cifar-10-binary.tar.gz",
                        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
        with tarfile.open(path) as archive:     # read, never unpacked
            files = sorted(name for name in archive.getnames() if name.endswith(".bin"))
            parts = [np.frombuffer(archive.extractfile(name).read(), np.uint8) for name in files]
        table = torch.from_numpy(np.concatenate(parts)).view(-1, 1 + 3 * 32 * 32)   # label, pixels
        # Five training batches, then test_batch.bin.
        is_test = torch.arange(len(table)) >= len(table) * 5 // 6
        return table[:, 1:].view(-1, 3, 32, 32), table[:, 0].long(), is_test
    try:
        with np.load(data, allow_pickle=False) as arrays:
            images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    except OSError as error:
        raise ValueError(f"--data {data}: {error.strerror or 'not an .npz file'}; "
                         "give digits, cifar10 or an .npz file") from None
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        raise ValueError(f"--data {data}: not an .npz file with arrays `images` and `labels`") from None
    images = images.unsqueeze(-1) if images.dim() == 3 else images
    if (images.dtype != torch.uint8 or images.dim() != 4 or images.size(-1) not in (1, 3)
            or images.numel() == 0 or labels.shape != images.shape[:1]
            or labels.is_floating_point() or labels.min() < 0):
        raise ValueError(f"--data {data}: images must be uint8 (N, height, width) or (N, height, width, 3), "
                         "labels (N,) integers from 0")
    return images.movedim(-1, 1), labels.long(), None


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


# ------------------------------------------------------------------------------------------------------------
# The task; training and tables are train_lm.py's


class Images:
    """Classification, scored on the same images enlarged to more and more patches."""
    tables = {"accuracy_extended": "% right, the grid extended, at a size of",
              "accuracy_interpolated": "% right, the training grid interpolated, at a size of",
              "accuracy": "% right, extended or interpolated as the validation images say, at a size of"}

    def __init__(self, args, about=None, read=True):
        self.args, self.about = args, about
        if not 0 < args.keep <= 1:
            raise ValueError(f"--keep must be above 0 and at most 1, got {args.keep}")
        patch = args.patch_size
        self.sizes = [round(args.image_size * m / patch) * patch for m in MAGNIFICATIONS]
        if not read:
            return
        images, labels, is_test = read_images(args.data)
        self.about = about or {"n_channels": images.size(1), "n_classes": int(labels.max()) + 1}
        # Of every nine images one is for validation and, where there is no test set, two are one.
        ninth = torch.arange(len(images)) % 9
        is_test = ninth > 6 if is_test is None else is_test
        is_val = (ninth == 0) & ~is_test
        self.splits = {name: (images[of], labels[of]) for name, of in
                       (("train", ~is_val & ~is_test), ("val", is_val), ("test", is_test))}
        if not all(len(labels) for _, labels in self.splits.values()):
            raise ValueError(f"--data {args.data}: {len(images)} images are too few")

    def model(self, pe):
        args = self.args
        check_digits(pe, self.sizes[-1] // args.patch_size, args)
        return ViT(ViTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, pe=pe,
                             fusion=args.fusion, n_digits=args.digits, base=args.base, pe_width=args.pe_width,
                             spread=args.spread, image_size=args.image_size, patch_size=args.patch_size,
                             **self.about))

    def batch(self, generator):
        """Images (B, channels, size, size), labels (B,), and indices (n,) of the patches to look at.

        A random share of the patches is left out in each step (after PatchDropout, Liu et al. 2022).
        Attention that always meets the same number of them tends to fail among nine times as many.
        """
        images, labels = self.splits["train"]
        which = torch.randint(len(labels), (self.args.batch_size,), generator=generator)
        images = augment(images[which], self.args.image_size, generator)
        n_patches = (self.args.image_size // self.args.patch_size) ** 2
        n_kept = torch.randint(math.ceil(self.args.keep * n_patches), n_patches + 1, (), generator=generator)
        return images, labels[which], torch.randperm(n_patches, generator=generator)[:n_kept]

    def loss(self, model, batch, positions=None):
        """positions: (B, T, 2) or None."""
        images, labels, kept = (t.to(self.args.device) for t in batch)
        return model(images, labels, positions, kept=kept)[1]

    @torch.no_grad()
    def accuracy(self, model, split, size, interpolate=False):
        right, (images, labels) = [], self.splits[split]
        for images, labels in zip(images.split(100), labels.split(100)):
            logits = model(draw(images, size).to(self.args.device), interpolate=interpolate)[0]
            right.append(logits.argmax(-1).cpu() == labels)
        return torch.cat(right).float().mean().item() * 100

    def validate(self, model):
        return self.accuracy(model, "val", self.args.image_size)

    def evaluate(self, model):
        extended, interpolated, chosen = {}, {}, {}
        for size in self.sizes:
            # A table cannot be extended, and at the training size there is nothing to do.
            one_way = model.config.pe == "learned" or size == self.args.image_size
            val, test = ([self.accuracy(model, split, size, interpolate) for interpolate in
                          ([True] if one_way else [False, True])] for split in ("val", "test"))
            extended[size], interpolated[size] = test[0], test[-1]
            chosen[size] = test[val.index(max(val))]
        return {"accuracy_extended": extended, "accuracy_interpolated": interpolated, "accuracy": chosen}

    def format(self, percent):
        return f"{percent:.1f}"

    def show(self, model):
        if model.encoder:
            print(f"\nafter training\n{heat_map(model.encoder)}")


def main(argv=None):
    parser = Parser(__doc__, ["seqpe", "rope", "rope_mixed", "sinusoidal", "learned", "nope"])
    parser.add_argument("--data", default="digits", help="digits, cifar10, or an .npz file")
    parser.add_argument("--image-size", type=at_least(1), default=32, help="training size, in pixels")
    parser.add_argument("--patch-size", type=at_least(1), default=4, help="size of a patch, in pixels")
    parser.add_argument("--keep", type=float, default=0.25, help="least share of patches in a training step")
    parser.set_defaults(**DEFAULTS)
    return run_all(Images, parser.parse(argv, PRESETS))


if __name__ == "__main__":
    run_script(main)

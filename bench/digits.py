"""The judge of the demo: what share of a checkpoint's digits can be read as the digit that was asked for?

    python -m bench.digits --ckpt out/demo-T8-x/ema.safetensors out/demo-T8-v/ema.safetensors --csv out/digits.csv

A small convolutional network learns to read the demo's digits, from drawings that no run has trained on, and then reads
samples. Two numbers follow for each checkpoint:

    read      the share of samples that it takes for the class that was asked for
    distance  the Frechet distance between samples and drawn digits, each set described by mean and covariance of the 64
              features before the reader's last layer, in units of the drawn digits' own variance there. It is made as
              FID is, by a network that needs no download, and the two cannot be compared with each other.

The distance between two sets of drawn digits, of as many images, is what a perfect generator would get: the floor.
"""
import pathlib
import sys
import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F

from fid import frechet_distance
from lib.digits import draw_digits
from lib.flags import Parser, number
from lib.images import list_images, open_image
from lib.run import BadInput, RunFailed, pick_device, program, rank, say
from lib.table import append_rows, read_rows
from sample import balanced_labels, compile_net, generate, load_denoiser, open_vae
from vae import image_tensor

SIZE = 32
COLUMNS = ("ckpt", "target", "weights", "step", "cfg", "steps", "seed", "n", "read", "distance", "floor", "reader")


def drawn(per_class, seed):
    """Drawn digits, uint8 (10 * per_class, 3, 32, 32), and their labels: the demo's data, from another seed."""
    with tempfile.TemporaryDirectory() as folder:
        folder = f"{folder}/digits"
        draw_digits(folder, per_class, seed)
        _, items = list_images(folder)
        images = [image_tensor(open_image(f"{folder}/{path}")) for path, _ in items]
    return torch.stack(images), torch.tensor([label for _, label in items])


class Reader(nn.Module):
    """uint8 images (B, 3, 32, 32) -> (features (B, 64), logits (B, 10))."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images):
        h = images.float() / 127.5 - 1                                                     # (B, 3, 32, 32)
        for conv in (self.conv1, self.conv2, self.conv3):
            h = F.relu(conv(h))                                                            # at last (B, 64, 4, 4)
        features = F.relu(self.hidden(h.flatten(1)))                                       # (B, 64)
        return features, self.out(features)

    @torch.inference_mode()
    def read(self, images):
        features, logits = zip(*(self(part) for part in images.split(256)))
        return torch.cat(features), torch.cat(logits)


def train_reader(images, labels, epochs=6, seed=0):
    torch.manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for indices in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(reader(images[indices])[1], labels[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return reader.eval()


def statistics(features):
    """Mean and covariance, in float64, of features (n, 64)."""
    return features.double().mean(0), features.double().T.cov()


def sampled(path, weights, n, cfg, steps, seed, device):
    """(the denoiser of a checkpoint, n samples of it as uint8 on the CPU). BadInput where it draws no such digits."""
    from tqdm import tqdm
    denoiser = load_denoiser(path, weights, device)
    vae = open_vae(denoiser.settings, denoiser.net.in_channels, None, device)
    classes, size = denoiser.net.num_classes, denoiser.net.input_size * vae.stride
    if (classes, size) != (10, SIZE):
        raise BadInput(f"{path}: draws {classes} classes, {size} pixels wide; expected 10 and {SIZE}, as the demo's")
    batches = [range(i, min(n, i + 128)) for i in range(0, n, 128)]
    if n >= 1000:
        compile_net(denoiser.net, device)
    return denoiser, torch.cat([generate(denoiser, vae, indices, range(10), seed, cfg, steps=steps).cpu()
                                for indices in tqdm(batches, unit="batch", leave=False, disable=rank() > 0 or None)])


@program
def main(argv=None):
    parser = Parser("How many of a checkpoint's digits can be read, and how far are they from drawn ones?")
    parser.add_argument("--ckpt", type=pathlib.Path, nargs="+", required=True, help="checkpoints of demo runs")
    parser.add_argument("--weights", choices=("ema", "ema2", "model"), default="ema", help="which of their weights")
    parser.add_argument("--n", type=number(int, 100), default=1000, help="samples a checkpoint, classes taking turns")
    parser.add_argument("--cfg", type=number(float, 0, 1000), default=1.5, help="guidance scale")
    parser.add_argument("--steps", type=number(int, 1), default=50, help="ODE steps")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the samples")
    parser.add_argument("--csv", type=pathlib.Path, help="table to which a row per checkpoint is added")
    args = parser.parse_args(argv)
    if args.csv:
        read_rows(args.csv, COLUMNS)  # fail first
    # Drawings that neither a run nor the reader has seen (the demo's, whatever its --seed, are those of seed 0).
    reader = train_reader(*drawn(300, seed=1001))
    images, labels = drawn(2 * -(-args.n // 10), seed=1002)  # two sets of n, of all classes alike
    features, logits = reader.read(images)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    unit = features.var(0).sum().sqrt()
    real, other = statistics(features[0::2] / unit), statistics(features[1::2] / unit)
    floor = frechet_distance(*real, *other)
    say(f"reader: right on {accuracy:.2%} of {len(images)} drawings it never saw; their halves are {floor:.4f} apart")
    if accuracy < 0.99:
        raise RunFailed(f"the reader gets {accuracy:.2%} of drawn digits right: too few to judge others by")
    labels = balanced_labels(range(10), range(args.n))
    for path in args.ckpt:
        denoiser, images = sampled(path, args.weights, args.n, args.cfg, args.steps, args.seed, pick_device())
        features, logits = reader.read(images)
        share = (logits.argmax(1) == labels).double().mean().item()
        distance = frechet_distance(*statistics(features / unit), *real)
        step = denoiser.settings.get("step", "")
        say(f"{path}: {denoiser.target}-prediction, step {step}, {args.weights}, cfg {args.cfg:g}: "
            f"{share:.1%} of {args.n} read as asked, distance {distance:.4f} (floor {floor:.4f})")
        if args.csv:
            row = (path, denoiser.target, args.weights, step, f"{args.cfg:g}", args.steps, args.seed, args.n,
                   f"{share:.4f}", f"{distance:.6f}", f"{floor:.6f}", f"{accuracy:.4f}")
            append_rows(args.csv, COLUMNS, [dict(zip(COLUMNS, row))])


if __name__ == "__main__":
    sys.exit(main())

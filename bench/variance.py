"""How much samples vary along each direction of the data, and so what a network leaves out.

    python -m bench.variance data/cifar10-64 --ckpt out/x.safetensors out/v.safetensors --out v.png
    python -m bench.variance data/cifar10-64 --ckpt out/x.safetensors --match --out x.png

The directions are those of bench/spectrum.py, the eigenvectors of the covariance of the data's
tokens, largest variance first. The variance of samples along them, around the data's mean, is drawn
beside the data's own.

What to expect where a network passes nothing of a direction: the clean latent that it stands for is
then a multiple c of z alone, and the sampler follows dz/dt = (c - 1) z / (1-t) from noise of
variance 1. The variance at t = 1 depends on the target alone. For x, c = 0 and all noise is taken
out: 0. For v, c = 1 and all of it stays: 1. For edm, c = k t / ((1-t)² + k t²), and k is left. So a
network that predicts x blurs what it leaves out, and one that predicts v leaves noise there.

--match is a control for FID: it gives the samples the data's variance along each direction, by
scaling them down where they vary more and by adding noise where they vary less, and writes the
images beside the checkpoint, NAME-matched.npz, for fid.py --npz. Where two targets differ less
after it than before, variance along these directions was part of the difference.
"""
import numpy as np
import torch

from bench.figures import COLORS, DASHES, image_path, pyplot, save_figure
from bench.geometry import load_networks
from bench.spectrum import spectrum, token_statistics, tokens
from lib.files import atomic
from lib.flags import Parser, number, path
from lib.run import image_batches, log, pick_device, program
from sample import guided_velocity, noise_and_labels, ode_sample
from vae import LatentDataset, open_vae, to_uint8


@torch.inference_mode()
def draw(denoiser, n):
    """n latents (n, C, H, W) on the CPU. Classes take turns; no guidance; ab2 with 25 steps."""
    latents = []
    for indices in image_batches(n, 64):
        noise, y = noise_and_labels(denoiser.net, indices)
        latents.append(ode_sample(guided_velocity(denoiser, y), noise, 25, "ab2").cpu())
    return torch.cat(latents)


def matched(parts, eigenvalues):
    """Tokens (N, D), given along the directions, with their mean squares turned into the data's
    eigenvalues (D,)."""
    variance = parts.square().mean(0).clamp(min=1e-12)                  # (D,)
    missing = (eigenvalues - variance).clamp(min=0)
    noise = torch.randn(parts.shape, dtype=parts.dtype, generator=torch.Generator().manual_seed(0))
    return parts * (eigenvalues / variance).clamp(max=1).sqrt() + noise * missing.sqrt()


def write_images(file, latents, vae):
    """Decode latents into ADM's sample file."""
    images = [to_uint8(vae.decode(part)).permute(0, 2, 3, 1).cpu() for part in latents.split(64)]
    with atomic(file) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, arr_0=torch.cat(images).numpy())
    log(f"-> {file}")


@program
def main(argv=None):
    parser = Parser("The variance of samples along each direction of the data.")
    add = parser.add_argument
    add("cache", metavar="CACHE", type=path, help="the latents that the networks learned from")
    add("--ckpt", type=path, nargs="+", required=True, help="checkpoints of one patch size")
    add("--num-samples", type=number(int, 1, 10**6), default=2000, help="images per checkpoint")
    add("--out", type=image_path, required=True, help="the figure, NAME.png")
    add("--match", action="store_true", help="write the samples, given the data's variance")
    args = parser.parse_args(argv)
    data = LatentDataset(args.cache)
    denoisers = load_networks(args.ckpt, data)
    patch = denoisers[0].net.patch_size
    codecs = [open_vae(denoiser.settings, denoiser.net.in_channels, device=pick_device())
              for denoiser in denoisers if args.match]
    plt = pyplot()  # like the codecs here already, to fail early
    mean, covariance = token_statistics(data, patch)
    eigenvalues, vectors = spectrum(covariance)

    columns = [eigenvalues]
    for i, (file, denoiser) in enumerate(zip(args.ckpt, denoisers)):
        latents = draw(denoiser, args.num_samples)
        parts = (tokens(latents, patch) - mean) @ vectors               # along the directions
        columns.append(parts.square().mean(0))
        if args.match:
            rows = (matched(parts, eigenvalues) @ vectors.T + mean).float()
            latents = denoiser.net.unpatchify(rows.view(len(latents), -1, rows.shape[1]))
            write_images(file.with_name(f"{file.stem}-matched.npz"), latents, codecs[i])

    # The table and the chart, both of neighbouring directions in up to 32 groups.
    targets = ["data", *(denoiser.target for denoiser in denoisers)]
    log(f"{args.cache.name}, patch {patch}: mean variance by direction; predicts "
        + ", ".join(f"{target} ({file})" for target, file in zip(targets[1:], args.ckpt)))
    log(f"{'directions':<12}" + "".join(f"{target:>10}" for target in targets))
    groups = torch.arange(len(mean)).tensor_split(min(len(mean), 32))
    for group in groups:
        name = f"{int(group[0]) + 1}-{int(group[-1]) + 1}"
        log(f"{name:<12}" + "".join(f"{row[group].mean():>10.4f}" for row in columns))
    log(f"{'sum':<12}" + "".join(f"{row.sum():>10.1f}" for row in columns))

    figure, panel = plt.subplots(figsize=(8, 4.2))
    positions = [float(group.double().mean()) + 1 for group in groups]
    for i, (target, row) in enumerate(zip(targets, columns)):
        style = dict(color=COLORS[target], label=f"samples: predicts {target}",
                     linestyle=DASHES[targets[:i].count(target) % 4])
        if i == 0:
            style = dict(color="black", linewidth=3, alpha=0.5, label="data")
        panel.plot(positions, [float(row[group].mean()) for group in groups], **style)
    panel.set(yscale="log", xlabel="direction, largest variance of the data first",
              ylabel="variance", title=f"samples and data, patch {patch}")
    save_figure(figure, args.out)


if __name__ == "__main__":
    raise SystemExit(main())

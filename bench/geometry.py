"""What the targets ask, direction by direction: theory as lines, trained networks as dots.

    python -m bench.geometry data/demo-pixels --ckpt out/demo-T8-x/ema.safetensors \\
        out/demo-T8-eps/ema.safetensors out/demo-T8-v/ema.safetensors --out assets/geometry.png

The directions are the eigenvectors of the covariance of the data's tokens, largest eigenvalue
first. The lines are what a Gaussian with that covariance asks for (bench/spectrum.py). The dots are
measured on networks that see the same images and noise. A network can lie below a line of an error,
because data is not Gaussian and because it sees all tokens; above it, the network does worse than a
linear prediction from one token would.
"""
import torch

from bench.figures import COLORS, image_path, pyplot, save_figure
from bench.spectrum import best_prediction, evenly_spread, spectrum, token_statistics, tokens
from lib.checkpoint import load_denoiser
from lib.flags import Parser, path
from lib.run import BadInput, log, pick_device, program
from model import coefficients
from sample import image_noise
from vae import LatentDataset

T, N = 0.3, 512  # the time, near the median of training's; latents on which networks are measured

# Title of each panel: the name of what it shows, in the theory and among what was measured.
PANELS = {
    "what the target asks: variance of the prediction": "asked",
    "coefficient of the prediction on z": "coefficient",
    "squared error, in the target's own space": "ambiguity",
    "squared error of the velocity (theory is the same for all)": "velocity error",
}


def load_networks(files, data):
    """The denoisers of checkpoints. Raises BadInput unless all have one patch size and take latents
    such as those of the cache `data`."""
    denoisers = [load_denoiser(file, device=pick_device()) for file in files]
    patch = denoisers[0].net.patch_size
    for file, net in zip(files, (denoiser.net for denoiser in denoisers)):
        if (net.patch_size, net.in_channels, net.input_size) != (patch, *data.shape[:2]):
            raise BadInput(f"{file}: expected patch {patch}, as the first has, and latents of "
                           f"{data.shape}")
    return denoisers


@torch.inference_mode()
def measure(denoiser, data, vectors):
    """The PANELS of a network, {name: (D,)}, by direction (vectors (D, D), one per column): the
    variance of its prediction, the least-squares coefficient on z, and its squared errors."""
    net, device = denoiser.net, next(denoiser.parameters()).device
    a, b = coefficients(denoiser.target, T)
    parts = []
    for indices in evenly_spread(len(data), N):
        x, y = data.batch(indices)
        x, y = x.to(device).float(), y.to(device)
        e = image_noise(0, indices, data.shape).to(device)
        z = T * x + (1 - T) * e
        prediction = net(z, torch.full((len(x),), T, device=device), y).float()
        error = prediction - (a * x + b * e)
        velocity_error = denoiser.to_velocity(prediction, z, T) - (x - e)
        parts.append([tokens(value.cpu(), net.patch_size) @ vectors
                      for value in (prediction, z, error, velocity_error)])
    prediction, z, error, velocity_error = map(torch.cat, zip(*parts))  # each (tokens, D)
    prediction, z = prediction - prediction.mean(0), z - z.mean(0)
    return {"asked": prediction.square().mean(0),
            "coefficient": (prediction * z).mean(0) / z.square().mean(0),
            "ambiguity": error.square().mean(0),
            "velocity error": velocity_error.square().mean(0)}


def theory(eigenvalues, targets):
    """{target: the PANELS of the best linear prediction, {name: (D,)}}."""
    velocity_error = best_prediction("v", eigenvalues, T)["ambiguity"]
    return {target: best_prediction(target, eigenvalues, T) | {"velocity error": velocity_error}
            for target in targets}


def draw(file, title, lines, measured):
    """Draw the lines {target: panels} and the measured [(target, panels)], averaged over up to 48
    groups of neighbouring directions."""
    count = len(next(iter(lines.values()))["asked"])
    groups = min(count, 48)

    def grouped(row):
        return [float(part.double().mean()) for part in torch.tensor_split(row, groups)]

    positions = grouped(torch.arange(1, count + 1))
    figure, panels = pyplot().subplots(2, 2, figsize=(12, 8))
    figure.suptitle(title)
    for panel, (head, name) in zip(panels.flat, PANELS.items()):
        panel.set(title=head, xlabel="direction, largest variance of the data first")
        for target, rows in lines.items():
            panel.plot(positions, grouped(rows[name]), label=target, color=COLORS[target])
        for target, rows in measured:
            panel.scatter(positions, grouped(rows[name]), 14, color=COLORS[target])
        if name != "coefficient":
            panel.set_yscale("log")
            panel.set_ylim(bottom=max(panel.get_ylim()[0], 1e-6))  # some variances are 0
    save_figure(figure, file)


@program
def main(argv=None):
    parser = Parser("What the targets ask: theory as lines, trained networks as dots.")
    add = parser.add_argument
    add("cache", metavar="CACHE", type=path, help="the latents that the networks learned from")
    add("--ckpt", type=path, nargs="+", required=True, help="checkpoints, one per target")
    add("--out", type=image_path, required=True, help="the figure, NAME.png")
    args = parser.parse_args(argv)
    data = LatentDataset(args.cache)
    denoisers, measured = load_networks(args.ckpt, data), []
    patch = denoisers[0].net.patch_size
    eigenvalues, vectors = spectrum(token_statistics(data, patch)[1])
    lines = theory(eigenvalues, [denoiser.target for denoiser in denoisers])
    for file, denoiser in zip(args.ckpt, denoisers):
        target = denoiser.target
        rows = measure(denoiser, data, vectors)
        measured.append((target, rows))
        error, line = rows["velocity error"].mean(), lines[target]["velocity error"].mean()
        log(f"{file}: predicts {target}, t = {T:g}: velocity error {error:.4f} (line {line:.4f})")
    title = f"{args.cache.name}, patch {patch}, t = {T:g}: lines are theory, dots are networks"
    draw(args.out, title, lines, measured)


if __name__ == "__main__":
    raise SystemExit(main())

"""What a network takes the clean image to be, from pure noise to the end, as it draws.

    python -m bench.strip out/RUN-x/ema.safetensors out/RUN-v/ema.safetensors --cfg 2 \\
        --out assets/strip.png

At time t the velocity v says where the path would end if it went straight on: at z + (1-t) v, the
prediction of the clean latent, whatever the network predicts. A row for each image and network, all
from the same noise; the last column is the drawn image.
"""
import pathlib

import torch

from bench.chart import picture
from bench.progress import side_by_side
from lib.checkpoint import load_denoiser
from lib.device import pick_device
from lib.files import atomic
from lib.flags import Parser, number
from lib.run import program, say
from sample import balanced_labels, guided_velocity, image_noise, ode_sample, pick_classes
from vae import open_vae, to_uint8

TIMES = [i / 10 for i in range(10)]


@torch.inference_mode()
def predictions(denoiser, n, classes, cfg, seed=0):
    """Latents (n, C, H, W) of the clean images as predicted at each of TIMES, and the samples."""
    net, device, seen = denoiser.net, next(denoiser.parameters()).device, {}
    y = balanced_labels(classes, range(n)).to(device)
    velocity = guided_velocity(denoiser, y, cfg)
    shape = net.in_channels, net.input_size, net.input_size
    noise = image_noise(seed, range(n), shape).to(device)

    def noted(z, t):
        v = velocity(z, t)
        seen[t] = z + (1 - t) * v  # Heun asks twice: what stays is of the point on the path
        return v

    samples = ode_sample(noted, noise, 50)
    return [seen[t] for t in TIMES] + [samples]


@program
def main(argv=None):
    parser = Parser("The prediction of the clean image on the way from noise to data.")
    add = parser.add_argument
    add("ckpts", metavar="CKPT", type=pathlib.Path, nargs="+", help="networks, on the same latents")
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers, taking turns")
    add("--rows", type=number(int, 1, 20), default=4, help="images of each network")
    add("--cfg", type=number(float, 0, 1000), default=2.0, help="guidance scale")
    add("--seed", type=number(int, 0), default=0, help="of the noise")
    add("--out", type=picture, default="assets/strip.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    cells, title = {}, f"predicted clean image, guidance {args.cfg:g}"
    for path in args.ckpts:
        denoiser = load_denoiser(path, device=pick_device())
        net, names = denoiser.net, denoiser.settings.get("class_names")
        vae = open_vae(denoiser.settings, net.in_channels, device=pick_device())
        classes = pick_classes(args.classes, names, net.num_classes)
        latents = predictions(denoiser, args.rows, classes, args.cfg, args.seed)
        strip = torch.stack([to_uint8(vae.decode(z)).cpu() for z in latents], 1)
        cells |= {(title, f"{denoiser.target}, no. {i + 1}"): row for i, row in enumerate(strip)}
    names = sorted((name for _, name in cells), key=lambda name: int(name.split()[2]))  # by image
    captions = [f"t = {t:g}" for t in TIMES] + ["sample"]
    with atomic(args.out) as temporary:
        side_by_side(cells, names, len(captions), captions).save(temporary, "png")
    say(f"-> {args.out}")


if __name__ == "__main__":
    raise SystemExit(main())

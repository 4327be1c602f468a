"""At which times is one network better than another? Samples that change networks on the way.

    python -m bench.switch out/x-1/ema.safetensors out/v-1/ema.safetensors \\
        --ref data/cifar.npz --csv out/switch.csv --out assets/switch.png

Whatever a network predicts, it becomes a velocity before the sampler sees it. So a sampler may
follow one network from noise up to some time and another one from there to the data, and FID then
tells which of the times make their difference. Both orders are drawn, at each time of --times, and
both networks alone, all from the same noise, unguided, by ab2 with 25 steps.

The same command continues where it was interrupted: what is in the table is not drawn again.
"""
import torch

from bench.figures import image_path, pyplot, save_figure
from fid import compare, load_extractors, load_reference, score
from lib.checkpoint import load_denoiser, weights_hash
from lib.flags import Parser, number, path
from lib.log import append_row, read_table
from lib.run import BadInput, compile_net, from_rank_0, log, pick_device, program, rank
from lib.run import rank_batches
from sample import guided_velocity, noise_and_labels, ode_sample, with_floor
from vae import open_vae, to_uint8

METRICS = ("fid", "mmd")


@torch.inference_mode()
def switched_latents(first, second, at, indices):
    """The samples with these indices, latents (B, C, H, W): the velocity is that of the denoiser
    `first` at times below `at`, and that of `second` from there on."""
    z, y = noise_and_labels(first.net, indices)
    early, late = guided_velocity(first, y), guided_velocity(second, y)

    def velocity(z, t):
        return early(z, t) if t < at else late(z, t)
    # ab2 extrapolates from the step before, which must not be the other network's.
    return ode_sample(velocity, z, 25, "ab2", [at] if 0 < at < 1 else [])


@program
def main(argv=None):
    parser = Parser("FID of samples that change from one network to another, against the time.")
    add = parser.add_argument
    add("ckpts", metavar="CKPT", type=path, nargs=2, help="two networks for the same latents")
    add("--times", type=number(float, 0.01, 0.99), nargs="+", default=[0.2, 0.4, 0.6, 0.8],
        help="when to change")
    add("--ref", type=path, required=True, help="from fid.py --save-ref --metrics fid mmd")
    add("--inception", type=path, help="Inception's weights (default: torch's cache or a download)")
    add("--num-samples", type=number(int, 2), default=2500, help="images per score")
    add("--csv", type=path, required=True, help="the table")
    add("--out", type=image_path, required=True, help="the figure, NAME.png")
    args = parser.parse_args(argv)
    device, n = pick_device(), args.num_samples
    denoisers = [with_floor(load_denoiser(file, device=device), None) for file in args.ckpts]
    nets, targets = zip(*((denoiser.net, denoiser.target) for denoiser in denoisers))
    for what in ("input_size", "vae", "class_names"):
        one, other = (denoiser.settings.get(what) for denoiser in denoisers)
        if one != other:
            raise BadInput(f"networks of the same latents and classes are needed; their {what} are "
                           f"{one} and {other}")
    vae = open_vae(denoisers[0].settings, nets[0].in_channels, device=device)
    reference, plt = load_reference(args.ref, METRICS), pyplot()
    side = nets[0].input_size * vae.stride
    reference.check_size(f"{side}x{side}")
    columns, _ = read_table(args.csv)
    if columns and not {"early", "late", "at"} <= set(columns):
        raise BadInput(f"{args.csv}: not a table of these scores: choose another --csv")
    if not args.csv.absolute().parent.is_dir():
        raise BadInput(f"{args.csv}: its folder does not exist")
    extractors = load_extractors(METRICS, args.inception, device=device)
    hashes = [weights_hash(net) for net in nets]
    for net in nets:
        compile_net(net, device)

    def fid(first, second, at):
        """FID of n samples; `first` and `second` are 0 or 1, for the networks."""
        settings = dict(early=targets[first], late=targets[second], at=f"{at:g}", n=str(n),
                        early_network=hashes[first], late_network=hashes[second],
                        vae=vae.id, reference=reference.hash)
        for row in from_rank_0(read_table(args.csv)[1]):
            if settings.items() <= row.items():
                return float(row["fid"])
        latents = ((indices, switched_latents(denoisers[first], denoisers[second], at, indices))
                   for indices in rank_batches(n, 64))
        batches = ((indices, to_uint8(vae.decode(z))) for indices, z in latents)
        scores = compare(score(batches, n, extractors), extractors, reference)
        append_row(args.csv, settings | {name: f"{scores[name]:.4f}" for name in METRICS})
        log(f"{settings['early']} before {at:g}, then {settings['late']}: FID {scores['fid']:.2f}")
        return scores["fid"]

    alone = [fid(i, i, 1) for i in (0, 1)]
    changed = [(fid(0, 1, at), fid(1, 0, at)) for at in args.times]
    if rank() == 0:
        figure, panel = plt.subplots(figsize=(7, 4.4))
        for first, second in ((0, 1), (1, 0)):
            # A change at 0 leaves everything to the second network, one at 1 to the first.
            points = [(0, alone[second]), *zip(args.times, (pair[first] for pair in changed)),
                      (1, alone[first])]
            panel.plot(*zip(*sorted(points)), "o-", label=f"{targets[first]}, then "
                       f"{targets[second]}")
        panel.set(xlabel="time of the change: noise at 0, data at 1", ylabel=f"FID-{n}, unguided")
        save_figure(figure, args.out)


if __name__ == "__main__":
    raise SystemExit(main())

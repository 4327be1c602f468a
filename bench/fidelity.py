"""fid.py beside torch-fidelity in one run: features, FID, Inception Score, and their speed.

    python -m bench.fidelity --inception FILE --images FOLDER --against FOLDER --n 2000

Needs torch-fidelity, best in an environment of its own: pip install torch-fidelity
"""
import statistics
import time

import torch

import fid
from lib.flags import Parser, number, path
from lib.images import folder_images
from lib.inception import load_inception
from lib.run import BadInput, log, program


@torch.inference_mode()
def compare(ours, theirs, folder, n, seconds):
    """On n images of a folder: (our Statistics, their features (n, 2048), the largest relative
    difference between an image's features). Appends (our, their) seconds per batch."""
    n, _, batches = folder_images(folder, None, n, 50)
    sums, kept, largest = fid.Statistics(n), [], 0.0
    for indices, images in batches:
        start = time.perf_counter()
        features, logits = ours(images)                                 # (B, 2048), (B, 1008)
        middle = time.perf_counter()
        reference, _ = theirs(images)                                   # (B, 2048)
        seconds.append((middle - start, time.perf_counter() - middle))
        sums.update(features, logits, indices)
        kept.append(reference)
        difference = (features - reference).norm(dim=1) / reference.norm(dim=1)
        largest = max(largest, difference.max().item())
    return sums, torch.cat(kept), largest


@program
def main(argv=None):
    parser = Parser("fid.py beside torch-fidelity.")
    add = parser.add_argument
    add("--inception", type=path, required=True, help="Inception's weights")
    add("--images", type=path, required=True, help="folder of images")
    add("--against", type=path, required=True, help="folder of images to compare them with")
    add("--n", type=number(int, 100), default=2000, help="images of each")
    args = parser.parse_args(argv)
    try:
        from torch_fidelity import feature_extractor_inceptionv3, metric_fid, metric_isc
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        raise BadInput("this needs torch-fidelity, and torchvision for this torch: pip install "
                       f"torch-fidelity ({error})") from None
    ours = load_inception(args.inception)
    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(args.inception))
    seconds = []
    sums, features, largest = compare(ours, theirs, args.images, args.n, seconds)
    other_sums, other_features, other = compare(ours, theirs, args.against, args.n, seconds)
    log(f"features: largest relative difference of an image {max(largest, other):.2e}")
    our_fid = fid.frechet_distance(*sums.mean_and_covariance(), *other_sums.mean_and_covariance())
    moments = [metric_fid.fid_features_to_statistics(part) for part in (features, other_features)]
    their_fid = metric_fid.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"]
    logits = torch.randn(args.n, 1008, generator=torch.Generator().manual_seed(0)) * 3
    our_is = fid.inception_score(logits)
    their_is = metric_isc.isc_features_to_metric(logits)["inception_score_mean"]
    for name, a, b in ("FID", our_fid, their_fid), ("IS of random logits", our_is, their_is):
        log(f"{name}: {a:.8f}, torch-fidelity {b:.8f}, relative difference {abs(a / b - 1):.2e}")
    a, b = (statistics.median(values) for values in zip(*seconds))
    log(f"speed: 50 images in {a:.2f} s, torch-fidelity {b:.2f} s (medians), {b / a:.2f} times")


if __name__ == "__main__":
    raise SystemExit(main())

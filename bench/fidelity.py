"""fid.py beside torch-fidelity, in one run: features, FID, Inception Score, and the time each takes.

    python -m bench.fidelity --inception FILE --images FOLDER --against FOLDER --n 2000

torch-fidelity has to be installed for this (pip install torch-fidelity), best in an environment of its own. It imports
torchvision, whose operators a CPU build of torch may lack; nothing here uses them, so they are declared beforehand.
"""
import pathlib
import statistics
import sys
import time

import torch

import fid
from lib.flags import Parser, number
from lib.run import program


def torch_fidelity(weights):
    """torch-fidelity's extractor, and its modules for FID and IS."""
    try:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # a working torchvision
    from torch_fidelity import metric_fid, metric_isc
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    names = ["2048", "logits_unbiased"]
    extractor = FeatureExtractorInceptionV3("published", names, feature_extractor_weights_path=str(weights))
    return extractor, metric_fid, metric_isc


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


@program
def main(argv=None):
    parser = Parser("fid.py beside torch-fidelity.")
    parser.add_argument("--inception", type=pathlib.Path, required=True, help="Inception's weights")
    parser.add_argument("--images", type=pathlib.Path, required=True, help="folder of images")
    parser.add_argument("--against", type=pathlib.Path, required=True, help="folder of images to compare them with")
    parser.add_argument("--n", type=number(int, 100), default=2000, help="images of each")
    parser.add_argument("--batch", type=number(int, 1, 50), default=50, help="images at a time")
    args = parser.parse_args(argv)
    ours = fid.load_inception(args.inception)
    theirs, metric_fid, metric_isc = torch_fidelity(args.inception)
    sums, kept, seconds, largest = [], [], [], 0
    with torch.inference_mode():
        for folder in (args.images, args.against):
            n, _, batches = fid.folder_images(folder, None, args.n, args.batch)
            sums.append(fid.Statistics(n))
            kept.append([])
            for indices, images in batches:
                pair = [None, None]
                for which in ((0, 1) if len(seconds) % 2 else (1, 0)):  # neither is always first
                    pair[which] = timed((ours, theirs)[which], images)
                ((features, logits), time_ours), ((reference, _), time_theirs) = pair
                largest = max(largest, ((features - reference).norm(dim=1) / reference.norm(dim=1)).max().item())
                sums[-1].update(features, logits, indices)
                kept[-1].append(reference)
                seconds.append((time_ours, time_theirs))
    mu, sigma = sums[1].mean_and_covariance()
    ours_fid = fid.frechet_distance(*sums[0].mean_and_covariance(), mu, sigma)
    both = [metric_fid.fid_features_to_statistics(torch.cat(features)) for features in kept]
    theirs_fid = metric_fid.fid_statistics_to_metric(*both, False)["frechet_inception_distance"]
    exact = [metric_fid.fid_features_to_statistics(torch.cat(features).double()) for features in kept]
    exact_fid = metric_fid.fid_statistics_to_metric(*exact, False)["frechet_inception_distance"]
    logits = torch.randn(args.n, 1008, generator=torch.Generator().manual_seed(0)) * 3
    ours_is, theirs_is = fid.inception_score(logits), metric_isc.isc_features_to_metric(logits)["inception_score_mean"]
    a, b = (statistics.median(times) for times in zip(*seconds[2:]))
    print(f"features: largest relative difference of an image {largest:.2e}")
    for name, mine, other in (("FID", ours_fid, theirs_fid), ("FID, their features in float64", ours_fid, exact_fid),
                              ("IS of random logits", ours_is, theirs_is)):
        print(f"{name}: {mine:.8f}, torch-fidelity {other:.8f}, relative difference {abs(mine / other - 1):.2e}")
    print(f"speed: {args.batch} images in {a:.2f} s, torch-fidelity {b:.2f} s: {b / a:.2f} times as fast "
          f"(medians of {len(seconds) - 2} batches each, taking turns; {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    sys.exit(main())

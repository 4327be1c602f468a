"""fid.py beside torch-fidelity in one run: an image's features, and FID.

    python -m bench.fidelity --inception FILE --images FOLDER --against FOLDER

Needs torch-fidelity, best in an environment of its own: pip install torch-fidelity
"""
import torch

import fid
from lib.flags import Parser, path
from lib.images import folder_images
from lib.inception import load_inception
from lib.run import BadInput, log, program

N = 2000  # images of each folder


@torch.inference_mode()
def compare(ours, theirs, folder):
    """On N images of a folder: (our Statistics, their features (N, 2048), the largest relative
    difference between an image's features)."""
    _, _, batches = folder_images(folder, None, N, 50)
    sums, kept, largest = fid.Statistics(N), [], 0.0
    for indices, images in batches:
        features, logits = ours(images)                                 # (B, 2048), (B, 1008)
        (reference,) = theirs(images)                                   # (B, 2048)
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
    args = parser.parse_args(argv)
    try:
        from torch_fidelity import feature_extractor_inceptionv3, metric_fid
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        raise BadInput("this needs torch-fidelity, and torchvision for this torch: pip install "
                       f"torch-fidelity ({error})") from None
    ours = load_inception(args.inception)
    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "", ["2048"], feature_extractor_weights_path=str(args.inception))
    sums, features, largest = compare(ours, theirs, args.images)
    other_sums, other_features, other = compare(ours, theirs, args.against)
    log(f"features: largest relative difference of an image {max(largest, other):.2e}")
    a = fid.frechet_distance(*sums.mean_and_covariance(), *other_sums.mean_and_covariance())
    moments = [metric_fid.fid_features_to_statistics(part) for part in (features, other_features)]
    b = metric_fid.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"]
    log(f"FID: {a:.8f}, torch-fidelity {b:.8f}, relative difference {abs(a / b - 1):.2e}")


if __name__ == "__main__":
    raise SystemExit(main())

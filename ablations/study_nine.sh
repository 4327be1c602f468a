# All nine pairs of prediction and loss, in pixels (docs/results.md). LATENTS and VAL are caches of
# CIFAR-10 at 32² made with --vae pixels. About an hour and a half on one core, scores included.
source "$(dirname "$0")/study.sh"
RECIPE+=(--steps 1000 --ema 0.99 --patch 8)
SAMPLES=2048

for loss in v x eps; do
    for target in x v eps; do
        train "$target-${loss}loss-seed0" train.py --target "$target" --loss "$loss"
        score "$target-${loss}loss-seed0" --cfg 1
    done
done
for target in x v; do
    train "$target-${target}loss-seed1" train.py --target "$target" --loss "$target" --seed 1
    score "$target-${target}loss-seed1" --cfg 1
done
table

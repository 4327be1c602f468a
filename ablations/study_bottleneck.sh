# What the bottleneck does at patch 2: B with and without it, x and v (docs/results.md). Without a
# GPU, a smaller network shows it as well: MODEL=T STEPS=1000 WIDTHS="0 32 128".
source "$(dirname "$0")/study.sh"
RECIPE+=(--patch 2 --model "${MODEL:-B}" --steps "${STEPS:-2000}" --ema 0.998)

for target in x v; do
    for bottleneck in ${WIDTHS:-0 128 512}; do
        train "$target-b$bottleneck" train.py --target "$target" --bottleneck "$bottleneck"
        score "$target-b$bottleneck" --cfg 1
    done
done
table

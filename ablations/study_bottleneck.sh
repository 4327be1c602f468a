# What the bottleneck does at patch 2: B with and without it, x and v (docs/results.md). On a CPU a
# smaller network shows it as well: add the row M of that page to SIZES in model.py, and set
# MODEL=M STEPS=1000 BATCH=128 LR=1e-3 WARMUP=0.25 EMA=0.99.
source "$(dirname "$0")/study.sh"
RECIPE+=(--patch 2 --model "${MODEL:-B}" --steps "${STEPS:-2000}" --batch "${BATCH:-1024}"
         --lr "${LR:-4e-4}" --warmup "${WARMUP:-5}" --ema "${EMA:-0.998}" --sample-every 1000)

for target in ${TARGETS:-x v}; do
    for bottleneck in ${WIDTHS:-0 128}; do
        train "$target-b$bottleneck" train.py --target "$target" --bottleneck "$bottleneck"
        score "$target-b$bottleneck" --cfg 1 2
    done
done
table

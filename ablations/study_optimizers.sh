# Learning rates of AdamW and of Muon, with x as the target at patch 2 (docs/techniques.md).
source "$(dirname "$0")/study.sh"
RECIPE+=(--steps 6000 --ema 0.999 --patch 2)

for lr in 5e-4 1e-3 2e-3 4e-3; do
    RECIPE+=(--lr "$lr")  # the last one counts
    train "adamw-$lr" train.py
    train "muon-$lr" -m ablations.muon
    score "adamw-$lr" --cfg 1
    score "muon-$lr" --cfg 1
done
table

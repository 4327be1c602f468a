# The paper's table in small: three targets at two patch sizes, a second seed of x and v
# (docs/results.md). About eight hours on one core, and two more for the scores.
source "$(dirname "$0")/study.sh"
RECIPE+=(--steps 6000 --ema 0.999)

for patch in 1 2; do
    for run in x:0 v:0 eps:0 x:1 v:1; do
        target=${run%:*} seed=${run#*:}
        train "$target-$patch-seed$seed" train.py --target "$target" --patch "$patch" --seed "$seed"
        score "$target-$patch-seed$seed" --cfg 1
        score "$target-$patch-seed$seed" --cfg 3 --method ab2 --steps 25
    done
    # What the sampler's floor does: none for x, 1/50 for eps.
    score "x-$patch-seed0" --cfg 1 --t-eps 0
    score "eps-$patch-seed0" --cfg 1 --t-eps 0.02
done
table

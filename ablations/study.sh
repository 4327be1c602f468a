# What the studies share; each of them sources this file. A study is a list of runs that differ in
# one thing, trained and scored alike. Running it again continues where it was interrupted.
#
#   LATENTS=data/cifar10-64 VAL=data/cifar10-64-test REF=data/cifar.npz INCEPTION=FILE \
#       bash ablations/study_targets.sh
#
# INCEPTION may be left out where torch's cache has Inception's weights. docs/results.md shows how
# the caches and the reference are made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${LATENTS:?}" "${VAL:?}" "${REF:?}"
STUDY=$(basename "$0" .sh); STUDY=out/${STUDY#study_}

# Seven minutes to half an hour per run on one CPU core.
RECIPE=(--model T --batch 128 --lr 1e-3 --warmup 0.25 --decay 0.3 --log-every 100
        --sample-every 500 --save-every 500)
SAMPLES=5000

# train NAME PROGRAM [flags]: PROGRAM is train.py or -m ablations.TECHNIQUE.
train() {
    name=$1; shift
    python "$@" --latents "$LATENTS" --val "$VAL" --out "$STUDY/$name" "${RECIPE[@]}"
}

# score NAME [flags of fid.py]
score() {
    name=$1; shift
    python fid.py --ckpt "$STUDY/$name/ema.safetensors" --ref "$REF" --num-samples "$SAMPLES" \
        --metrics fid mmd ${INCEPTION:+--inception "$INCEPTION"} "$@"
}

table() {
    python -m ablations.table "$STUDY"/*/
}

# Each technique of this folder with x as the target (docs/techniques.md). LATENTS has to hold the
# images (vae.py --keep-images), and TEACHER names a vision backbone for REPA.
source "$(dirname "$0")/study.sh"
RECIPE+=(--steps 6000 --ema 0.999 --patch 1)
: "${TEACHER:?}"
REPA=(--teacher "$TEACHER" --hidden 512)

train plain train.py
train plain-seed1 train.py --seed 1
train contrastive -m ablations.contrastive
train tread -m ablations.tread
train repa -m ablations.repa "${REPA[@]}"
train repa-stopped -m ablations.repa "${REPA[@]}" --until 2000
train irepa -m ablations.repa "${REPA[@]}" --conv --gamma 0.6 --align-weight 1
train repa-contrastive -m ablations.repa_contrastive "${REPA[@]}"
train repa-tread -m ablations.repa_tread "${REPA[@]}"
for run in plain plain-seed1 contrastive tread repa repa-stopped irepa repa-contrastive \
        repa-tread; do
    score "$run" --cfg 1
done
table

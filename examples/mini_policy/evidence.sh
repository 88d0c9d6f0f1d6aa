#!/usr/bin/env bash
# Every episode that docs/evidence.md reports on; from the root of the checkout, with the extras `libero` and `viz`:
#
#     examples/mini_policy/evidence.sh 5 widened        # the first 5 starts of each of the ten tasks, widened positions
#     examples/mini_policy/evidence.sh 5 stock          # the same at LIBERO's own positions
#     examples/mini_policy/evidence.sh 50 widened dense # only these variants, more starts
#
# Stopped at any moment and started again it goes on; a larger number adds starts to those that are there.
set -euo pipefail
episodes=$1 positions=$2
shift 2
variants=(
    dense
    random@keep=0.5 random@keep=0.39 random@keep=0.25 random@keep=0.125
    uniform_grid@keep=0.5 uniform_grid@keep=0.39 uniform_grid@keep=0.25 uniform_grid@keep=0.125
    fastv@keep=0.5 fastv@keep=0.25 fastv@keep=0.125
    divprune@keep=0.39 divprune@keep=0.25 efficientvla_tokens@keep=0.25
    vla_cache sparsevlm sparsevlm@recycle=true sparsevlm-recycle
    specprune specprune-paper specprune-c3
    specprune.static specprune.dynamic specprune.controller
    dense+blind dense+no-primary dense+no-wrist dense+other-instruction
)
declare -A spread=([widened]=0.05 [stock]=0)
here=$(dirname "${BASH_SOURCE[0]}")
exec "${TOKENPRUNE:-tokenprune}" eval "${@:-${variants[@]}}" --preset mini --dtype float32 \
    --starts "$here/starts-$positions.json" --episodes "$episodes" \
    --env-option size=224 --env-option quality=fast --env-option "spread=${spread[$positions]}" \
    --workers "${WORKERS:-$(nproc)}" --out "docs/evidence/mini-$positions.jsonl"

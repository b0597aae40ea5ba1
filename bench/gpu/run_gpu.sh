#!/usr/bin/env bash
# Everything that a GPU can prove, in stages of under nine minutes each.
#
#   bench/gpu/run_gpu.sh             all stages
#   bench/gpu/run_gpu.sh --stage N   one of: 1 correctness, 2 sweep, 3 op benchmarks,
#                                    4 the whole step with the teacher cached, 5 the teacher on the view, 6 moco,
#                                    7 data path and retrieval,
#                                    8 every loader in a separate process, and how long a run waits for each
#
# Stages 3 to 7 leave bench/results/<gpu>/<date>_<commit>.json; send that file, and what stage 8 prints.
# Stage 2 may change kernels/configs.json: run `python -m kernels.aot --update` and stage 1 again before committing it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() { sed -n '2,11s/^# \{0,1\}//p' bench/gpu/run_gpu.sh; }
case "${1:-}" in
  "") stages="1 2 3 4 5 6 7 8" ;;
  --stage) [[ "${2:-}" =~ ^[1-8]$ ]] || { echo "--stage takes 1 to 8, got '${2:-}'" >&2; exit 2; }; stages=$2 ;;
  -h | --help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "needs torch and a CUDA GPU" >&2; exit 2; }

limit="timeout --signal=INT 530"
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT

stage_1() {
  $limit python -m pytest -q tests/kernels/test_infonce.py tests/kernels/test_maxout.py \
    tests/kernels/test_maxout_image.py tests/kernels/test_gradcam.py tests/engine/training/test_graph.py
}
stage_2() {
  $limit python -m bench.gpu.sweep --minutes 8
}
# A guard that fails is a result too: it is collected, and the stage fails afterwards.
stage_3() {
  local status=0
  $limit python -m pytest -q bench/bench_infonce.py bench/bench_maxout.py bench/bench_maxout_image.py \
    bench/bench_gradcam.py bench/bench_stem.py --benchmark-only --benchmark-json="$raw/ops.json" || status=$?
  python -m bench.summary collect "$raw/ops.json"
  return $status
}
step() { # selection: each holds one cold compile, or two
  local status=0
  $limit python -m pytest -q bench/bench_step.py --benchmark-only -k "$1" --benchmark-json="$raw/step.json" || status=$?
  python -m bench.summary collect "$raw/step.json"
  return $status
}
stage_4() { step "not moco and not view"; }
stage_5() { step "view"; }
stage_6() { step "moco"; }
stage_7() {
  local status=0
  $limit python -m pytest -q tests/kernels/test_augment.py tests/engine/data/loaders/test_resident_loader.py \
    tests/engine/data/loaders/test_dali_loader.py tests/engine/data/test_views.py || status=$?
  $limit python -m pytest -q bench/bench_data.py bench/bench_augment.py bench/bench_retrieval.py --benchmark-only \
    --benchmark-json="$raw/engine.json" || status=$?
  python -m bench.summary collect "$raw/engine.json"
  return $status
}
stage_8() {
  $limit python -m bench.bench_data 4096
  $limit python -m bench.bench_data wait
}

for stage in $stages; do
  echo "stage $stage"
  "stage_$stage"
done

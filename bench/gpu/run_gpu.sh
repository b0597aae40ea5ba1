#!/usr/bin/env bash
# What a GPU can prove, in seven stages of under nine minutes each. Every result is a line in DIR as soon as it is there.
#
#   bench/gpu/run_gpu.sh [--out DIR]             all stages
#   bench/gpu/run_gpu.sh [--out DIR] --stage N   one of: 1 ceilings and correctness, 2 the PP-SSL step, 3 the MoCo step and the
#                                                published structure, 4 the ops, 5 data path and retrieval, 6 a run, end to end,
#                                                7 batch-norm and combined kernels on and off, and the teacher on the view
#   bench/gpu/run_gpu.sh [--out DIR] --quick     ceilings, PP-SSL and MoCo against the published structure, the ops (8 minutes)
#
# A stage that fails does not end the others; the exit code tells of it. Stages that were cut off are started again: what was
# measured before stays in DIR/lines.jsonl. The default of DIR is bench/results/<gpu>; at the end the lines become one file there,
# <date>_<commit>.json, to be committed. Where ncu (Nsight Compute) is installed, stage 4 profiles the kernels of InfoNCE and of
# batch-norm into DIR/ncu_*.ncu-rep.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() { sed -n '2,14s/^# \{0,1\}//p' bench/gpu/run_gpu.sh; }
stages="1 2 3 4 5 6 7"
out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --stage) [[ "${2:-}" =~ ^[1-7]$ ]] || { echo "--stage takes 1 to 7, got '${2:-}'" >&2; exit 2; }; stages=$2; shift 2 ;;
    --quick) stages=quick; shift ;;
    --out) [ -n "${2:-}" ] || { echo "--out takes a folder" >&2; exit 2; }; out=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
done
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "needs torch and a CUDA GPU" >&2; exit 2; }
[ -n "$out" ] || out=$(python -m bench.summary folder) || exit 2
mkdir -p "$out"
export PPSSL_BENCH_LINES="$out/lines.jsonl"

failed=""
try() { # command...: what fails is remembered, and the next command runs
  echo "+ $*"
  timeout -k 20 -s INT "${limit:-530}" "$@" || failed="$failed; $* ($?)"
}
profiled() { # file kernels command...: kernels whose names match, under ncu where Nsight Compute is installed; at most 40 launches
  command -v ncu > /dev/null || { echo "no ncu on this machine: $1 is not profiled"; return; }
  try ncu --kernel-name "regex:$2" --launch-count 40 --set full --clock-control none --force-overwrite -o "$out/ncu_$1" "${@:3}"
}
bench() { try python -m pytest -q --benchmark-only "$@"; }
ceilings() { python -m bench.gpu.ceilings | tee -a "$PPSSL_BENCH_LINES" || failed="$failed; ceilings"; }

stage_1() {
  ceilings
  limit=250 try python -m pytest -q tests/kernels/test_infonce.py tests/kernels/test_maxout.py tests/kernels/test_maxout_image.py \
    tests/kernels/test_gradcam.py tests/kernels/test_batch_norm.py
  limit=250 try python -m pytest -q tests/engine/training/test_graph.py
}
# one cold compilation each, which took six minutes on a slow core: the graphed step finds the compiled one's code in the cache
stage_2() { bench bench/bench_step.py -k "test_rung and (cached or compiled or graphed) and not (moco or lcr or ldfs or view or torch or uncombined)"; }
stage_3() {
  limit=350 bench bench/bench_step.py -k "test_rung and moco and not (torch or uncombined)"
  limit=180 bench bench/bench_step.py -k "test_step_guard"
}
stage_4() {
  limit=330 bench bench/bench_infonce.py bench/bench_maxout.py bench/bench_maxout_image.py bench/bench_gradcam.py bench/bench_batch_norm.py
  limit=90 profiled infonce "_split_kernel|_merge_kernel" python -m pytest -q --benchmark-only bench/bench_infonce.py -k "guard"
  limit=90 profiled batch_norm "_bn_" python -m pytest -q --benchmark-only bench/bench_batch_norm.py -k "ours and layer1"
}
stage_5() {
  limit=170 try python -m pytest -q tests/kernels/test_augment.py tests/engine/data/loaders/test_resident_loader.py \
    tests/engine/data/loaders/test_same_pixels.py
  limit=250 bench bench/bench_augment.py bench/bench_data.py bench/bench_embed.py bench/bench_retrieval.py
  limit=100 try python -m bench.bench_data 2000 nvJPEG
}
stage_6() {
  limit=520 try python -m engine.train --cfg demo --amp --profile 5 --out "$out/run"
}
stage_7() {
  limit=260 bench bench/bench_step.py -k "test_rung and (torch or uncombined) and not moco"
  limit=260 bench bench/bench_step.py -k "test_rung and ((torch or uncombined) and moco or compiled and view)"
}
stage_quick() {
  ceilings
  limit=300 bench bench/bench_step.py -k "test_rung and compiled and not (lcr or ldfs or view or torch or uncombined)"
  limit=100 bench bench/bench_step.py -k "test_rung and published"
  limit=80 bench bench/bench_infonce.py bench/bench_gradcam.py -k "guard"
}

for stage in $stages; do
  echo "== stage $stage"
  "stage_$stage"
done
python -m bench.summary collect "$PPSSL_BENCH_LINES" --out "$out" || failed="$failed; collect"
[ -z "$failed" ] || { echo "failed:${failed#;}" >&2; exit 1; }

#!/usr/bin/env bash
# The former path of bench/gpu/run_gpu.sh.
exec "$(dirname "$0")/gpu/run_gpu.sh" "$@"

#!/usr/bin/env bash
# Parity and speed on the GPU of this machine; `scripts/gpu_check.sh --help` says more.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/../benchmarks/gpu_check.py" "$@"

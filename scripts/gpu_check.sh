#!/usr/bin/env bash
# Parity and speed on the GPU of this machine, in some minutes: the parity suite, each kernel against its floor, the
# encoder and a training step against dense, and MinkowskiEngine where it is installed for CUDA.
#
#   scripts/gpu_check.sh [folder]       leaves gpu-check.md, gpu-check.json and the log of each part there (gpu-check)
#
# It ends with 1 if a test fails or a part does not end well; the report then says so. With 2 where there is no GPU.
# FULL=1 adds large and huge.
# PYTHON names the interpreter. Nothing but torch, triton, timm, pytest and numpy is needed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-gpu-check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
rm -f "$out"/*.json "$out"/*.log "$out"/gpu-check.md

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: $python finds no torch, or torch no CUDA device; PYTHON=... names another interpreter" >&2
    exit 2
fi

status=0
notes=()

# part NAME SECONDS COMMAND...: run it, show it, keep its output, note how it ended.
part() {
    local name=$1 limit=$2 start=$SECONDS rc=0
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" || rc=$?
    if [ "$rc" -ne 0 ]; then status=1; fi
    notes+=(--note "- $name: $([ "$rc" -eq 0 ] && echo passed || echo "FAILED, status $rc"), $((SECONDS - start)) s; $(tail -n 1 "$out/$name.log" | cut -c1-200)")
}

models=(atto tiny base)
if [ "${FULL:-0}" = 1 ]; then models+=(large huge); fi
gpu=(--device cuda --dtype bfloat16)

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi # kernels compile side by side
part parity 300 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" -m cuda tests/ops tests/model
part ops 120 "$python" benchmarks/ops.py "${gpu[@]}" --models tiny base --batch-size 64 --json "$out/ops.json"
part encoder $((240 + 600 * ${FULL:-0})) "$python" benchmarks/encoder.py "${gpu[@]}" --what encoder --batch-size 64 \
    --models "${models[@]}" --backends triton triton+compile triton-depthwise+compile --json "$out/encoder.json"
part step 120 "$python" benchmarks/encoder.py "${gpu[@]}" --what step --batch-size 64 --models base \
    --backends triton triton+graphs --json "$out/step.json"
if "$python" -c 'import sys; from sparse_ops.minkowski import minkowski_engine; sys.exit(not minkowski_engine().is_cuda_available())' \
    2>/dev/null; then
    part minkowski 120 "$python" benchmarks/minkowski.py --device cuda --models tiny --batch-size 64 --backends triton \
        --json "$out/minkowski.json"
else
    notes+=(--note "- minkowski: not installed for CUDA")
fi

reports=$(find "$out" -maxdepth 1 -name '*.json' ! -name gpu-check.json | sort)
if [ -z "$reports" ]; then
    echo "gpu_check: no benchmark ended; see the logs in $out" >&2
    exit 1
fi
# shellcheck disable=SC2086  # one path a word
"$python" benchmarks/report.py $reports --title "GPU check, $(date -u +%F)" "${notes[@]}" \
    --markdown "$out/gpu-check.md" --json "$out/gpu-check.json" || status=1
echo "report: $out/gpu-check.md"
exit "$status"

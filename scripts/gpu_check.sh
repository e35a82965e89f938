#!/usr/bin/env bash
# Parity and speed on the GPU of this machine, in some minutes: the parity suite, each kernel against its floor, the
# encoder and a training step against dense, and MinkowskiEngine where it is installed for CUDA.
#
#   scripts/gpu_check.sh [folder]       leaves gpu-check.md, gpu-check.json and the log of each part there (gpu-check)
#
# It ends with 1 if a test fails or a part does not end well; the report then says so. With 2 where there is no GPU.
# FULL=1 adds large and huge.
# PYTHON names the interpreter, PROCESSES how many share the tests (8, or the number of cores).
# Nothing but torch, triton, timm, pytest and numpy is needed, and a C compiler, with which Triton builds launchers.
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

# part NAME COMMAND...: run it, show it, keep its output, note how it ended.
part() {
    local name=$1 start=$SECONDS rc=0
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.log" || rc=$?
    if [ "$rc" -ne 0 ]; then status=1; fi
    notes+=(--note "- $name: $([ "$rc" -eq 0 ] && echo passed || echo "FAILED, status $rc"), $((SECONDS - start)) s; $(tail -n 1 "$out/$name.log" | cut -c1-200)")
}

models=(atto tiny base)
if [ "${FULL:-0}" = 1 ]; then models+=(large huge); fi
gpu=(--device cuda --dtype bfloat16)
batch=(--batch-size 128) # small batches measure how fast kernels are launched

# The suite in processes that share the tests, since most of its time is spent compiling kernels.
parity() {
    local rc=0 pids=() i
    for i in $(seq "$processes"); do
        TEST_SHARD="$i/$processes" timeout 300 "$python" -m pytest -q -p no:cacheprovider -m cuda tests/ops tests/models \
            >"$out/parity-$i.log" 2>&1 &
        pids+=($!)
    done
    for i in $(seq "$processes"); do
        wait "${pids[i - 1]}" || rc=$?
        grep -aE '^(FAILED|ERROR)' "$out/parity-$i.log"
        tail -n 1 "$out/parity-$i.log"
    done
    echo "$(counted passed) passed, $(counted failed) failed, $(counted skipped) skipped, in $processes processes"
    return "$rc"
}

counted() {
    tail -q -n 1 "$out"/parity-*.log | grep -oE "[0-9]+ $1" | awk '{ sum += $1 } END { print sum + 0 }'
}

processes=${PROCESSES:-$(nproc)}
processes=$((processes < 8 ? processes : 8))
part parity parity
part ops timeout 240 "$python" benchmarks/ops.py "${gpu[@]}" --models tiny base "${batch[@]}" --json "$out/ops.json"
for model in "${models[@]}"; do # one at a time, so that a compilation without end costs one model
    case $model in large | huge) images=(--batch-size 32) ;; *) images=("${batch[@]}") ;; esac # dense must fit, too
    part "encoder-$model" timeout 300 "$python" benchmarks/encoder.py "${gpu[@]}" --what encoder "${images[@]}" \
        --models "$model" --backends triton triton+graphs triton-depthwise+compile --json "$out/encoder-$model.json"
done
part step timeout 240 "$python" benchmarks/encoder.py "${gpu[@]}" --what step "${batch[@]}" --models base \
    --backends triton triton+graphs --json "$out/step.json"
if "$python" -c 'import sys; from sparse_ops.backends.minkowski.layers import minkowski_engine; sys.exit(not minkowski_engine().is_cuda_available())' \
    2>/dev/null; then
    part minkowski timeout 120 "$python" benchmarks/minkowski.py --device cuda --models tiny --batch-size 64 --backends triton \
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

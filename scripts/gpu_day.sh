#!/usr/bin/env bash
# The first checks on a machine with a GPU: kernels against torch, sanitizer, step times. Nothing here needs vLLM.
#
#   scripts/gpu_day.sh [--dry-run] OUTPUT_FOLDER [STAGE...]      stages: card kernels sanitizer bench (default: all)
#
# Needs torch, triton, pytest, hypothesis, psutil and numpy, and vllm_lrqk/_cuda_kernels.so built for the card (make
# test-gpu builds it). Every step runs under a time limit, writes OUTPUT_FOLDER/STEP.log, and does not stop the others;
# OUTPUT_FOLDER/summary.txt has a line for each. With --dry-run, on a machine without a GPU, the same steps collect their
# tests and print their plans instead, and the kernels' operators are those of the emulator.
set -u
is_dry=
if [ "${1:-}" = --dry-run ]; then
  is_dry=1
  shift
fi
cd "$(dirname "$0")/.."
output=$(realpath -m "${1:?usage: scripts/gpu_day.sh [--dry-run] OUTPUT_FOLDER [STAGE...]}")
shift
stages=${*:-card kernels sanitizer bench}
python=${GPU_PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$output"

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout --kill-after=5 "$limit" "$@" > "$output/$name.log" 2>&1 || code=$?
  printf '%-20s exit %3d  %4d s  %s\n' "$name" "$code" "$((SECONDS - start))" "$(tail -n 1 "$output/$name.log" | cut -c1-150)" |
    tee -a "$output/summary.txt"
}

tests() { "$python" -m pytest -q -p no:cacheprovider --tb=short -rfE ${is_dry:+--collect-only} "$@"; }
export -f tests
export python is_dry
card=(nvidia-smi)
load='from vllm_lrqk.devices.cuda_library import load; print(load())'
if [ "$is_dry" ]; then
  card=(echo "no card is asked for")
  load='import sys; sys.path.append("tests/support"); from emulated import emulated_operators as load; print(load())'
fi

for stage in $stages; do
  case $stage in
    card)
      step card 20 "${card[@]}"
      step load 60 "$python" -c "$load"
      ;;
    kernels)
      step select 90 bash -c 'tests tests/gpu/test_gpu_select.py'
      step pages 60 bash -c 'tests tests/gpu/test_gpu_table.py'
      step decode 60 bash -c 'tests tests/gpu/test_gpu_decode.py'
      step layer 90 bash -c 'tests tests/gpu/test_gpu_layer.py'
      step lola 90 bash -c 'tests tests/gpu/test_gpu_lola.py'
      ;;
    sanitizer)
      for tool in memcheck racecheck; do
        sanitizer=(compute-sanitizer --tool "$tool" --error-exitcode 9)
        [ "$is_dry" ] && sanitizer=(env)
        step "$tool" 60 "${sanitizer[@]}" "$python" -m pytest -q -x ${is_dry:+--collect-only} \
          -p no:cacheprovider tests/gpu/test_gpu_select.py -k 'heads_and_rank and mean and 16-64'
      done
      ;;
    bench)
      for residual in linear mean; do
        step "bench_$residual" 120 "$python" benchmarks/decode_cuda.py --lengths 131072 --batches 8 1 \
          --residual "$residual" --json "$output/$residual.json" ${is_dry:+--dry-run}
      done
      ;;
    *) echo "unknown stage: $stage" >&2; exit 2 ;;
  esac
done

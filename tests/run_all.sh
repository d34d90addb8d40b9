#!/usr/bin/env bash
# Everything that needs no GPU: `bash tests/run_all.sh [python]`. Goes on past a failing part and ends with a summary.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-.venv/bin/python}
PATH=$(cd "$(dirname "$(command -v "$python")")" && pwd):$PATH  # cmake and ninja, where they are packages of it
failed=()
part() {  # part NAME COMMAND...
  local name=$1 started=$SECONDS
  shift
  printf '\n=== %s\n' "$name"
  "$@" || failed+=("$name")
  printf '=== %s took %d s\n' "$name" $((SECONDS - started))
}
parallel="-q -n 2 --dist worksteal"

# One torch thread per worker: the two workers fill the two cores, and oversubscription is slower.
part "whole suite" env OMP_NUM_THREADS=1 "$python" -m pytest tests $parallel --durations 15
# The kernels' values at the lower instruction levels, and on two threads on the way.
unlevelled="compile or export or gradcheck or opcheck or reference_backend or autocast or few_python_calls"
unlevelled+=" or inference_mode or process_group or peak_memory"
for level in v3:2 base:1; do
  part "level ${level%:*} on ${level#*:} threads" \
    env FASTSEG_CPU_LEVEL=${level%:*} OMP_NUM_THREADS=${level#*:} OMP_WAIT_POLICY=passive \
    "$python" -m pytest tests/test_contract.py tests/ops $parallel -m "not slow" -k "not ($unlevelled)"
done
part "no compiled library" env OMP_NUM_THREADS=1 FASTSEG_CPU_LEVEL=none "$python" -m pytest \
  tests/test_contract.py $parallel -k "every_dtype or gradient_layouts"
part "benchmarks as tests" env OMP_NUM_THREADS=1 "$python" -m pytest benchmarks $parallel --benchmark-disable

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[@]}"
  exit 1
fi
printf '\nEverything passed.\n'

#!/usr/bin/env bash
# Everything that a GPU is needed for, from a bare checkout: no installation, no network, no .git.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bench/device.sh smoke|suite|tune|cache OUT

  smoke   versions, ceilings of copies and matrix products, then the tests that matter on a GPU (at most 150 s)
  suite   every speed figure, correctness first; run it again with the same OUT to go on where it ended
  tune    measure launch settings and write them to OUT
  cache   needs no GPU: compile every kernel for sm_90 into OUT/cache.tgz, so that a run with this OUT compiles none.
          Do it under the Python and the Triton of the machine that will take it

All results, logs and caches go to the folder OUT. What the environment may set:

  PYTHON           the interpreter (python3)
  WHEELS           folder of wheels for packages that this Python lacks, such as diffusers or pydantic (wheels)
  ESENGINE_COMMIT  the commit, for the records, where there is no .git
  DEVICE           cuda, or cpu for a rehearsal at toy size (cuda)
  BUDGET           seconds (smoke 150, suite 450, tune 480)
  WORKERS          processes for the tests (14 on a GPU, 2 on a CPU)
  PARTS            parts of the suite, by name and in order; cold for those of a first run, 300 s (all)
  TESTS            test files of smoke, instead of its own
  CACHE            where compiled kernels lie while it runs; Triton keeps whole paths, so take the same for each run
                   (/tmp/esengine-device). OUT/cache.tgz is unpacked there first and written at the end.
TEXT
}

mode=${1:-}
case $mode in
  smoke) budget=150 ;;
  suite) budget=450 ;;
  tune) budget=480 ;;
  cache) budget=0 ;;
  -h | --help) usage && exit 0 ;;
  *) usage >&2 && exit 2 ;;
esac
[ $# -eq 2 ] || { usage >&2 && exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
python=${PYTHON:-python3} wheels=${WHEELS:-$root/wheels} device=${DEVICE:-cuda} budget=${BUDGET:-$budget}
cache=${CACHE:-/tmp/esengine-device}
exec > >(tee -a "$out/$mode.log") 2>&1

# the package as it would be installed, and wheels of what is missing; -P, because transformers takes ./kernels for
# another package of that name
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r "$root/esengine" "$site/esengine"
cp -r "$root/kernels" "$site/esengine/kernels"
cp -r "$root/models" "$site/esengine/models"
for wheel in "$wheels"/*.whl; do
  [ -e "$wheel" ] || continue
  name=$(basename "$wheel")
  name=${name%%-*}
  "$python" -P -c "import importlib.util as u, sys; sys.exit(u.find_spec('$name') is None)" ||
    "$python" -m zipfile -e "$wheel" "$site"
done
export PYTHONPATH=$site:$root/bench PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 ESENGINE_CACHE=$cache/esengine
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor
mkdir -p "$cache"
[ ! -e "$out/cache.tgz" ] || tar -xzf "$out/cache.tgz" -C "$cache"
cd "$root"

status=0
case $mode in
  smoke)
    "$python" -P bench/device_smoke.py --device "$device" --json "$out/smoke.json" || status=$?
    tests=${TESTS:-tests/kernels/test_operands.py tests/kernels/test_factors.py tests/kernels/test_noise.py tests/kernels/test_es_update.py
      tests/kernels/test_fused_linear.py tests/models/test_sana_block.py tests/models/test_graphs_kernels.py}
    workers=${WORKERS:-$([ "$device" = cpu ] && echo 2 || echo 14)}
    # shellcheck disable=SC2086
    timeout $((budget > SECONDS ? budget - SECONDS : 1)) "$python" -P -m pytest -o addopts="--import-mode=importlib --strict-markers -ra" \
      -p no:cacheprovider --numprocesses "$workers" --dist worksteal --junit-xml "$out/smoke.xml" $tests || status=$?
    ;;
  suite)
    scale=$([ "$device" = cpu ] && echo tiny || echo full) smoke=()
    [ ! -e "$out/smoke.json" ] || smoke=(--smoke "$out/smoke.json")
    # shellcheck disable=SC2086
    "$python" -P bench/suite --scale "$scale" --device "$device" --budget "$budget" --resume \
      --json "$out/gpu_suite.json" "${smoke[@]}" \
      ${PARTS:+--parts $PARTS} || status=$?
    ;;
  cache)
    "$python" -P bench/aot.py --cache || status=$?
    "$python" -P bench/aot.py --cache | tee "$out/cache.txt" || status=$?
    grep -q ", 0 compiled," "$out/cache.txt" || { echo "device.sh: the second look found kernels to compile" && status=1; }
    ;;
  tune)
    minutes=$(awk "BEGIN { print $budget / 60 }")
    if [ "$device" = cpu ]; then
      TRITON_INTERPRET=1 "$python" -P bench/tune.py --scale tiny --budget-minutes "$minutes" --jobs 1 \
        --out "$out/settings.json" || status=$?
    else
      "$python" -P bench/tune.py --budget-minutes "$minutes" --out "$out/settings.json" || status=$?
    fi
    ;;
esac
tar -czf "$out/cache.tgz" -C "$cache" .
[ "$status" -eq 0 ] && echo "device.sh: $mode is done, its results are in $out" ||
  echo "device.sh: $mode failed with $status, see $out/$mode.log"
exit "$status"

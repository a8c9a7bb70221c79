#!/usr/bin/env bash
# One visit to a machine with a GPU, within 9 minutes: facts, tests, kernel times, expert servers.
#
#   scripts/gpu_visit.sh                 # results in benchmarks/results/visit, or, where $OUT is
#                                        # set, as one archive there, up to date after each step
#   scripts/gpu_visit.sh --tune[=PART]   # tunes tiles (of tables whose name has PART), and then
#                                        # measures with them; fewer tests, and no peers
#   scripts/gpu_visit.sh --rehearse      # all of it on a CPU under Triton's interpreter, tiny
#   scripts/gpu_visit.sh --rehearse --quick
#
# Each step has a limit of its own, and its failure does not stop the others; the exit code says
# whether any failed. Ray is not needed. Packages that the machine lacks are taken from wheels in
# .whl (see docs/gpu.md). PYTHON is the interpreter to use.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

tune= rehearse= quick=
for argument in "$@"; do
    case $argument in
        --tune) tune=_ ;;
        --tune=*) tune=${argument#--tune=} ;;
        --rehearse) rehearse=--rehearse ;;
        --quick) quick=--quick ;;
        *) sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
if [ -n "$quick" ] && [ -z "$rehearse" ]; then
    echo "--quick goes with --rehearse" >&2
    exit 2
fi

out=benchmarks/results/visit
python=${PYTHON:-$(if [ -x .venv/bin/python ]; then echo .venv/bin/python; else echo python3; fi)}
scratch=$(mktemp -d)
[ -z "${OUT:-}" ] || out=$scratch/visit
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
rm -rf "$out"/tiles
rm -f "$out"/steps.tsv "$out"/*.log "$out"/kernels.json "$out"/servers.json "$out"/facts.json
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TRITON_DEFAULT_FP_FUSION=1 # Triton 3.9 warns where it is not said
if [ -n "$rehearse" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
    unset TRITON_INTERPRET
fi

# step NAME SECONDS COMMAND...: runs it within its limit, keeps its output, and notes how it went.
failed=0
step() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    # Interrupted, a program says what it has so far.
    timeout --signal=INT --kill-after=8 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null
    code=$?
    [ "$code" -eq 0 ] || failed=1
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" "$limit" >>"$out/steps.tsv"
    echo "$name: exit $code after $((SECONDS - start)) s" >&2
    save
}

save() {
    [ -z "${OUT:-}" ] || { mkdir -p "$OUT" && tar -czf "$OUT/visit.tar.gz" -C "$scratch" visit; }
}

if compgen -G '.whl/*.whl' >/dev/null; then
    step wheels 40 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$scratch/site" .whl/*.whl
    export PYTHONPATH=$PWD:$scratch/site
fi
step facts 40 "$python" scripts/gpu_visit_report.py facts "$out/facts.json"

# Warnings of other versions of packages are no failures of ours. Compiling takes most of the time:
# many processes, where pytest-xdist is there.
pytest=("$python" -m pytest -q -p no:cacheprovider -W default)
if "$python" -c 'import xdist' >/dev/null 2>&1; then
    pytest+=(-n 12)
fi
kernel_tests=(tests/kernels/test_triton_[!s]*.py) # but sm90, which compiles and needs no GPU
if [ -n "$quick" ]; then
    step tests 120 "${pytest[@]}" tests/kernels/test_triton_backend.py -k dense
elif [ -n "$rehearse" ]; then
    step tests 300 "${pytest[@]}" tests/kernels/test_triton_backend.py
elif [ -n "$tune" ]; then
    step tests 80 "${pytest[@]}" -m gpu tests/kernels
else
    step tests 170 "${pytest[@]}" "${kernel_tests[@]}"
fi

if [ -n "$tune" ] && [ -z "$rehearse" ]; then # tuning times kernels: nothing to rehearse
    mkdir -p "$out/tiles"
    step tune 240 "$python" benchmarks/tune_kernels.py --only "${tune#_}" --minutes 3.7 \
        --out "$out/tiles"
fi

if [ -n "$quick" ]; then
    step kernels 120 "$python" benchmarks/kernels.py --rehearse --tokens 5 --shards more \
        --weights bf16 --budget-s 0 --json "$out/kernels.json"
elif [ -n "$rehearse" ]; then
    step kernels 200 "$python" benchmarks/kernels.py --rehearse --json "$out/kernels.json"
elif [ -n "$tune" ]; then
    step kernels 60 "$python" benchmarks/kernels.py --no-peers --tables "$out/tiles" \
        --json "$out/kernels.json"
else
    step kernels 200 "$python" benchmarks/kernels.py --budget-s 120 --json "$out/kernels.json"
fi

step servers 80 "$python" scripts/expert_server_end_to_end.py --json "$out/servers.json" \
    $rehearse $quick

"$python" scripts/gpu_visit_report.py table "$out" | tee "$out/table.txt"
save
exit "$failed"

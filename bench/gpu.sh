#!/usr/bin/env bash
# Builds, tests, checks and times the library on a machine with an NVIDIA GPU, without network, in under 9 minutes.
# Tables and the log go to the folder named by $OUT (default: bench/results/gpu). A part that fails or runs out of its
# time is recorded, and the next one starts. The exit status is the number of parts that failed.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: bash bench/gpu.sh [--only NAME] [--parts LIST] [--minutes N] [--device cuda|cpu] [--quick] [--dry-run]
  --only NAME    operators and cases whose name contains NAME (for tuning)
  --parts LIST   some of check,build,tests,launches,bench,memcheck,racecheck (default: all, in this order)
  --minutes N    for everything (default: 8.6); the benchmarks leave out what no longer fits, so for all of them run
                 the parts build,bench on their own
  --device cpu   the same parts on the CPU, as far as they go: to try the script
  --quick        few rounds, no long cases
  --dry-run      print what would run, and for how long at most
Environment: OUT (results), WORK (build and logs, default build/gpu), PYTHON (default python3), MAX_JOBS (default:
cores), PYEXT_CUDA_ARCHITECTURES (default: the GPU's own).
TEXT
}

only="" parts="check,build,tests,launches,bench,memcheck,racecheck" minutes="8.6" device="cuda" quick="" dry_run=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    --only | --parts | --minutes | --device)
      [[ $# -ge 2 ]] || { echo "gpu.sh: $1 needs a value" >&2; usage >&2; exit 64; }
      declare "${1#--}=$2"
      shift
      ;;
    --quick) quick="--quick" ;;
    --dry-run) dry_run=1 ;;
    --help) usage; exit 0 ;;
    *) echo "gpu.sh: unknown option $1" >&2; usage >&2; exit 64 ;;
  esac
  shift
done
for part in ${parts//,/ }; do
  [[ ",check,build,tests,launches,bench,memcheck,racecheck," == *",$part,"* ]] ||
    { echo "gpu.sh: unknown part $part" >&2; usage >&2; exit 64; }
done
[[ "$minutes" =~ ^[0-9]+(\.[0-9]+)?$ ]] || { echo "gpu.sh: --minutes $minutes is no number" >&2; exit 64; }
[[ "$device" == cuda || "$device" == cpu ]] || { echo "gpu.sh: --device is cuda or cpu, not $device" >&2; exit 64; }

# Folders as the caller means them, before this script goes to the project's own.
out="$(realpath -m "${OUT:-$(dirname "$0")/results/gpu}")"
work="$(realpath -m "${WORK:-$(dirname "$0")/../build/gpu}")"
cd "$(dirname "$0")/.." || exit 1
python="${PYTHON:-python3}"
log="$out/log.txt"
total=$(awk -v minutes="$minutes" 'BEGIN { printf "%d", 60 * minutes }')
summary_seconds=10
filter=()
[[ -n "$only" ]] && filter=(--only "$only")

# The package as `build` installs it, before the sources of the same name in this folder.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
export PYTHONPATH="$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
[[ "$device" == cpu ]] && export PYEXT_GPU_TESTS_ON=cpu

# Seconds that a part may take at most, and what is kept back for the parts after it.
limit_of() {
  case "$1" in
    check) echo 30 ;;
    build) echo 240 ;;
    tests) echo 120 ;;
    launches) echo 40 ;;
    bench) echo 420 ;;
    memcheck | racecheck) echo 50 ;;
  esac
}
kept_after() {
  case "$1" in
    build | tests | launches | bench) echo 100 ;;
    memcheck) echo 50 ;;
    *) echo 0 ;;
  esac
}

# What a part runs, one command, into the array `command`.
command_of() {
  local part="$1" limit="$2"
  case "$part" in
    check) command=("$python" -m bench.gpu_report check --device "$device") ;;
    build) command=("$python" -m bench.gpu_report build --device "$device" --site "$work/site") ;;
    tests)
      command=("$python" -m pytest -q -p no:cacheprovider tests/gpu)
      [[ -n "$only" ]] && command+=(-k "${only%% *}")
      "$python" -c "import xdist" 2>/dev/null && [[ "$device" == cuda ]] && command+=(-n 4)
      ;;
    launches) command=("$python" -m bench.launches --output "$out" "${filter[@]}") ;;
    bench)
      command=("$python" -m bench --device "$device" --output "$out" "${filter[@]}")
      command+=(--minutes "$(awk -v limit="$limit" 'BEGIN { printf "%.2f", (limit > 30 ? limit - 20 : 10) / 60 }')")
      [[ -n "$quick" ]] && command+=("$quick")
      ;;
    memcheck | racecheck)
      # Uncached allocations, so that memcheck sees where each ends.
      command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$(sanitizer || echo compute-sanitizer)" --tool "$part")
      command+=(--error-exitcode 9 --print-limit 20)
      [[ "$part" == memcheck ]] && command+=(--report-api-errors no)
      command+=("$python" -m bench.small_calls --device "$device" "${filter[@]}")
      ;;
  esac
}
sanitizer() {
  local found
  found="$(command -v compute-sanitizer)"
  for found in $found /usr/local/cuda*/bin/compute-sanitizer; do
    if [[ -x "$found" ]]; then echo "$found" && return 0; fi
  done
  return 1
}

# Why a part cannot run here at all; empty when it can.
absent() {
  case "$1" in
    launches) [[ "$device" == cuda ]] || echo "kernels are started on a GPU alone" ;;
    memcheck | racecheck) [[ -n "$(sanitizer)" ]] || echo "compute-sanitizer is not installed" ;;
  esac
}

smaller() { (($1 < $2)) && echo "$1" || echo "$2"; }

run_part() {
  local part="$1" began=$SECONDS status limit reason
  limit=$(smaller "$(limit_of "$part")" $((total - SECONDS - summary_seconds - $(kept_after "$part"))))
  reason=$([[ -n "$dry_run" ]] || absent "$part")
  if [[ -z "$reason" && "$limit" -lt 5 ]]; then reason="no time was left"; fi
  if [[ -n "$reason" ]]; then
    echo "== $part: not run, $reason"
    printf '%s\tnot run\t0\t%s\n' "$part" "$reason" >>"$work/parts.tsv"
    return 0
  fi
  command_of "$part" "$limit"
  echo "== $part, at most $limit s: ${command[*]@Q}"
  [[ -n "$dry_run" ]] && return 0
  timeout --kill-after=5 "$limit" "${command[@]}" 2>&1 | tee "$work/$part.log" | tail -n 15
  status=${PIPESTATUS[0]}
  case "$status" in
    0) printf '%s\tpassed\t%d\t\n' "$part" $((SECONDS - began)) ;;
    124 | 137) printf '%s\tout of time\t%d\tstopped after %d s\n' "$part" $((SECONDS - began)) "$limit" ;;
    *) printf '%s\tfailed\t%d\texit status %d\n' "$part" $((SECONDS - began)) "$status" ;;
  esac >>"$work/parts.tsv"
  { echo "===== $part ====="; tail -n 400 "$work/$part.log"; } >>"$log"
}

echo "gpu.sh: $total s in all, results in $out"
mkdir -p "$work"
: >"$work/parts.tsv"
if [[ -z "$dry_run" ]]; then
  mkdir -p "$out"
  : >"$log"
fi
for part in check build tests launches bench memcheck racecheck; do
  if [[ ",$parts," == *",$part,"* ]]; then run_part "$part"; fi
done
[[ -n "$dry_run" ]] && exit 0
timeout --kill-after=5 "$summary_seconds" "$python" -m bench.gpu_report summary --device "$device" --parts "$work/parts.tsv" --output "$out"
failed=$(awk -F '\t' '$2 == "failed" || $2 == "out of time"' "$work/parts.tsv" | wc -l)
echo "gpu.sh: $failed parts failed, took $SECONDS s"
exit "$failed"

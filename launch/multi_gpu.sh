#!/usr/bin/env bash
# Runs a command on one host with several GPUs: one process for all of them (as JAX does), or one per GPU.
#
# usage: launch/multi_gpu.sh [--process-per-gpu] [--max-restarts R] [--dry-run] -- COMMAND ...
#
#   --process-per-gpu  one process per GPU, as in a job of several hosts
#   --max-restarts R   with --process-per-gpu: number of restarts after a lost process (2)
#   --dry-run          print the commands instead of running them
#
#   launch/multi_gpu.sh -- stepdistill train paper_cqa --workdir runs/cqa --set LAYOUT=data
#
# CUDA_VISIBLE_DEVICES, if set, selects the GPUs. Exit status: COMMAND's, or as for local.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
. "$here/xla_flags.sh"

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
die() { echo "multi_gpu.sh: error: $*" >&2; exit 2; }

per_gpu='' dry_run='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --process-per-gpu) per_gpu=1 ;;
    --max-restarts) options+=("$1" "${2-}"); shift ;;
    --dry-run) dry_run=1; options+=("$1") ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1'; the command comes after '--' (see --help)" ;;
  esac
  shift || die "an option has no value (see --help)"
done
for number in ${options[@]+"${options[@]}"}; do
  [[ $number =~ ^(--.*|[0-9]+)$ ]] || die "expected a number, got '$number' (see --help)"
done
[ $# -gt 0 ] || die "no command after '--', e.g. -- stepdistill train CONFIG --workdir DIR"

if listed=$(nvidia-smi -L 2>&1); then
  gpus=$(grep -c '^GPU ' <<<"$listed" || true)
elif [ -n "$dry_run" ]; then  # show the commands for another host
  IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES-0,1,2,3,4,5,6,7}"
  gpus=${#visible[@]}
  echo "multi_gpu.sh: nvidia-smi does not work here; assuming a host with $gpus GPUs" >&2
else
  die "nvidia-smi does not work here: ${listed%%$'\n'*}"
fi
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  [ ${#visible[@]} -le "$gpus" ] || die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#visible[@]} GPUs, nvidia-smi lists $gpus"
  gpus=${#visible[@]}
fi
[ "$gpus" -gt 0 ] || die "no GPU: nvidia-smi -L lists none, or CUDA_VISIBLE_DEVICES is empty"

add_xla_flags gpu
export EXPECT_DEVICES=$gpus
if [ -n "$per_gpu" ]; then
  exec python3 "$here/processes.py" -n "$gpus" --gpus ${options[@]+"${options[@]}"} -- "$@"
elif [ -n "$dry_run" ]; then
  printf '%q ' env EXPECT_DEVICES="$gpus" XLA_FLAGS="$XLA_FLAGS" "$@"; echo
else
  exec "$@"
fi

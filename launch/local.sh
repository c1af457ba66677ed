#!/usr/bin/env bash
# Rehearses a multi-host job: N processes of one command on this machine's CPU.
#
# usage: launch/local.sh -n N [-d DEVICES_EACH] [--max-restarts R] [--grace SECS] [--dry-run] -- COMMAND ...
#
#   -n N              number of processes
#   -d DEVICES_EACH   CPU devices per process (1)
#   --max-restarts R  number of restarts after a lost process (2)
#   --grace SECS      seconds for the others to end after one has failed, and again after SIGTERM (5)
#   --dry-run         print the commands instead of running them
#
#   launch/local.sh -n 2 -d 2 -- stepdistill train demo_step_by_step --workdir runs/demo2 --set LAYOUT=fsdp
#
# Standard output comes from process 0, with the `[Gloo] Rank ...` lines of JAX's connections between CPU processes;
# everything else goes to standard error as `[PROCESS] line`. Processes are counted from 0.
# Exit status: 0 done; 75 stopped by a signal (start again); 134 a process was lost (start again); else the
# status of the process that failed first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=xla_flags.sh
. "$here/xla_flags.sh"

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
die() { echo "local.sh: error: $*" >&2; exit 2; }

processes='' devices=1 options=()
while [ $# -gt 0 ]; do
  case $1 in
    -n) processes=${2-}; shift ;;
    -d) devices=${2-}; shift ;;
    --max-restarts | --grace) options+=("$1" "${2-}"); shift ;;
    --dry-run) options+=("$1") ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1'; the command comes after '--' (see --help)" ;;
  esac
  shift || die "an option has no value (see --help)"
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "-n '$processes': expected a number of processes"
[[ $devices =~ ^[1-9][0-9]*$ ]] || die "-d '$devices': expected a number of devices"
for number in ${options[@]+"${options[@]}"}; do
  [[ $number =~ ^(--.*|[0-9]+(\.[0-9]+)?)$ ]] || die "expected a number, got '$number' (see --help)"
done
[ $# -gt 0 ] || die "no command after '--', e.g. -- stepdistill train CONFIG --workdir DIR"

cpu_devices "$devices"
export EXPECT_DEVICES=$((processes * devices))
exec python3 "$here/processes.py" -n "$processes" ${options[@]+"${options[@]}"} -- "$@"

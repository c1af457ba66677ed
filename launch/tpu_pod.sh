#!/usr/bin/env bash
# A Cloud TPU slice of one or many hosts, by gcloud: the same on all its hosts, always.
#
# usage: launch/tpu_pod.sh ACTION [OPTIONS] [-- COMMAND ...]
#
#   create  ask for the slice (a queued resource); needs --type, e.g. v5litepod-16
#   status  of that request; go on when it says ACTIVE
#   sync    copy this checkout to all hosts and install what constraints.txt pins
#   run     COMMAND on all hosts, until all have ended; the same again resumes
#   stop    SIGTERM on all hosts: they save, and `run` ends with 75
#   delete  the slice and its request: ends what it costs
#
#   --tpu NAME         of the slice ($TPU_NAME)
#   --zone ZONE        it is in ($ZONE)
#   --type TYPE        accelerator type, e.g. v5litepod-16, v5p-32, v6e-16
#   --version VERSION  runtime version (the one that Google names for TYPE)
#   --spot             create: cheaper, and taken away at any time
#   --project PROJECT  (gcloud's default)
#   --max-restarts R   run: how often to start again after a lost process (2)
#   --dry-run          print the gcloud commands
#
#   launch/tpu_pod.sh run --tpu pod --zone us-west4-a -- stepdistill train paper_cqa --workdir gs://BUCKET/cqa
#
# COMMAND starts in the home folder of each host; workdir and data lie where all hosts see them (gs://).
# EXPECT_DEVICES=16 in front stops before compiling where another number of devices is there.
# Exits with COMMAND's code (of the first host that failed); 255 is ssh's: no connection.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
die() { echo "tpu_pod.sh: error: $*" >&2; exit 2; }

action=${1-} tpu=${TPU_NAME-} zone=${ZONE-} type='' version='' restarts=2 dry_run='' spot=() project=()
case $action in
  create | status | sync | run | stop | delete) shift ;;
  -h | --help) usage; exit 0 ;;
  *) die "'$action' is no action; there are create, status, sync, run, stop, delete (see --help)" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=${2-}; shift ;;
    --zone) zone=${2-}; shift ;;
    --type) type=${2-}; shift ;;
    --version) version=${2-}; shift ;;
    --project) project=("--project=${2-}"); shift ;;
    --max-restarts) restarts=${2-}; shift ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1'; the command comes after '--' (see --help)" ;;
  esac
  shift || die "an option has no value (see --help)"
done
[ -n "$tpu" ] || die "--tpu NAME is missing"
[ -n "$zone" ] || die "--zone ZONE is missing, e.g. --zone us-west4-a"
[[ $restarts =~ ^[0-9]+$ ]] || die "--max-restarts '$restarts' is no number"
where=("--zone=$zone" ${project[@]+"${project[@]}"})

call() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all_hosts() { call gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all "--command=$1"; }

# what git tracks or would track: neither .venv nor runs
pack() {
  cd "$here/.."
  git ls-files -z --cached --others --exclude-standard \
    | while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done \
    | tar -czf "$1" --null -T -
}

sync() {
  local archive=stepdistill.tar.gz
  if [ -z "$dry_run" ]; then
    archive=$(mktemp -d)/$archive
    pack "$archive"
  fi
  call gcloud compute tpus tpu-vm scp "$archive" "$tpu:stepdistill.tar.gz" "${where[@]}" --worker=all
  [ -n "$dry_run" ] || rm -r "$(dirname "$archive")"
  # the system's Python is older than ours; uv brings one
  on_all_hosts 'set -e
rm -rf stepdistill_code && mkdir stepdistill_code && tar -xzf stepdistill.tar.gz -C stepdistill_code
python3 -m pip install --quiet --user uv
[ -d stepdistill_env ] || ~/.local/bin/uv venv --python 3.12 stepdistill_env
~/.local/bin/uv pip install --quiet --python stepdistill_env -c stepdistill_code/constraints.txt -e "stepdistill_code[tpu,gcs]"'
}

run() {
  local command expect='' code=0 attempt=0
  printf -v command '%q ' "$@"
  [ -z "${EXPECT_DEVICES-}" ] || expect="export EXPECT_DEVICES=$EXPECT_DEVICES"
  # the file holds the number of the process that `exec` makes of this shell: what `stop` asks to end
  command="set -e
. stepdistill_code/launch/xla_flags.sh
add_xla_flags tpu
export PATH=\"\$PWD/stepdistill_env/bin:\$PATH\"
$expect
echo \$\$ > stepdistill.pid
exec $command"
  while true; do
    code=0
    on_all_hosts "$command" || code=$?
    case $code in
      0 | 1 | 2) ;;
      75) echo "tpu_pod.sh: stopped after a clean save; the same command goes on" >&2 ;;
      255) echo "tpu_pod.sh: no connection to a host (its processes may run on: stop them first), or the slice is gone (see status); the same command resumes" >&2 ;;
      *)
        attempt=$((attempt + 1))
        echo "tpu_pod.sh: a process was lost (exit code $code; 134 is SIGABRT, by which JAX ends the peers of a dead or stuck one)" >&2
        if [ "$attempt" -le "$restarts" ]; then
          echo "tpu_pod.sh: starting again, $((restarts - attempt)) left" >&2
          continue
        fi
        ;;
    esac
    return "$code"
  done
}

# https://docs.cloud.google.com/tpu/docs/runtimes
case $type in
  v5litepod-*) : "${version:=v2-alpha-tpuv5-lite}" ;;
  v5p-*) : "${version:=v2-alpha-tpuv5}" ;;
  v6e-*) : "${version:=v2-alpha-tpuv6e}" ;;
  *) : "${version:=tpu-ubuntu2204-base}" ;;
esac
case $action in
  create)
    [ -n "$type" ] || die "--type TYPE is missing, e.g. --type v5litepod-16"
    call gcloud compute tpus queued-resources create "$tpu" "--node-id=$tpu" "${where[@]}" \
      "--accelerator-type=$type" "--runtime-version=$version" ${spot[@]+"${spot[@]}"}
    ;;
  status) call gcloud compute tpus queued-resources describe "$tpu" "${where[@]}" '--format=value(state.state)' ;;
  sync) sync ;;
  run)
    [ $# -gt 0 ] || die "no command after '--', e.g. -- stepdistill train CONFIG --workdir gs://BUCKET/RUN"
    run "$@"
    ;;
  stop) on_all_hosts "kill -TERM \$(cat stepdistill.pid)" ;;
  delete) call gcloud compute tpus queued-resources delete "$tpu" "${where[@]}" --force --quiet ;;
esac

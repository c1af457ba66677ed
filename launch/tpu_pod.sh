#!/usr/bin/env bash
# Manages a Cloud TPU slice of one or many hosts with gcloud; each action applies to all its hosts.
#
# usage: launch/tpu_pod.sh ACTION [OPTIONS] [-- COMMAND ...]
#
#   create  request the slice (a queued resource); needs --type
#   status  print the state of the request; the slice is usable when it is ACTIVE
#   sync    copy this checkout to all hosts and install the versions of constraints.txt
#   run     run COMMAND on all hosts until all have ended; the same command resumes
#   stop    send SIGTERM on all hosts: they save, and `run` exits with status 75
#   delete  delete the slice and its request, which ends the costs
#
#   --tpu NAME         name of the slice ($TPU_NAME)
#   --zone ZONE        zone of the slice ($ZONE)
#   --type TYPE        accelerator type, e.g. v5litepod-16, v5p-32, v6e-16
#   --version VERSION  runtime version (Google's recommendation for TYPE)
#   --spot             create: cheaper, but Google may reclaim the slice at any time
#   --project PROJECT  project (gcloud's default)
#   --max-restarts R   run: number of restarts after a lost process (2)
#   --dry-run          print the gcloud commands instead of running them
#
#   launch/tpu_pod.sh run --tpu pod --zone us-west4-a -- stepdistill train paper_cqa --workdir gs://BUCKET/cqa
#
# COMMAND starts in the home folder of each host; all hosts must see its workdir and data (gs://).
# With EXPECT_DEVICES=16 set, it stops before compiling if the number of devices differs.
# Exit status: COMMAND's (of the first host that failed), or 255 from ssh: no connection.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
die() { echo "tpu_pod.sh: error: $*" >&2; exit 2; }

action=${1-} tpu=${TPU_NAME-} zone=${ZONE-} type='' version='' restarts=2 dry_run='' spot=() project=()
case $action in
  create | status | sync | run | stop | delete) shift ;;
  -h | --help) usage; exit 0 ;;
  *) die "expected an action (create, status, sync, run, stop or delete), got '$action' (see --help)" ;;
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
[[ $restarts =~ ^[0-9]+$ ]] || die "--max-restarts '$restarts': expected a number"
where=("--zone=$zone" ${project[@]+"${project[@]}"})

call() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all_hosts() { call gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all "--command=$1"; }

# packs the files that git tracks or would track: neither .venv nor runs
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
  # the system's Python is too old; uv installs a newer one
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
  # `exec` turns this shell into COMMAND, so the file holds COMMAND's process id, which `stop` needs
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
      75) echo "tpu_pod.sh: stopped after a clean save; the same command resumes" >&2 ;;
      255) echo "tpu_pod.sh: no connection to a host (its processes may still run: stop them first), or the slice is gone (see status); the same command resumes" >&2 ;;
      *)
        attempt=$((attempt + 1))
        echo "tpu_pod.sh: a process was lost (exit status $code; 134 is SIGABRT, with which JAX ends the peers of a dead or stuck process)" >&2
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

#!/usr/bin/env bash
# Submits a workload to TPU slices of a GKE cluster that xpk has created (`xpk cluster create`).
#
# usage: launch/xpk.sh --cluster C --workload W --type TYPE --image IMAGE [OPTIONS] -- COMMAND ...
#
#   --type TYPE        accelerator type of each slice, e.g. v5litepod-16
#   --image IMAGE      image of launch/Dockerfile.tpu: REGION-docker.pkg.dev/PROJECT/REPOSITORY/stepdistill:1
#   --build            first build IMAGE from this checkout and push it
#   --num-slices N     number of slices (1); several need LAYOUT=hybrid or data
#   --zone ZONE        --project PROJECT   (gcloud's defaults)
#   --max-restarts R   restarts by GKE after exit status 75, a lost process or a lost node (10)
#   --dry-run          print the commands instead of running them
#
#   launch/xpk.sh --cluster pods --workload cqa --type v5litepod-16 --image IMAGE --num-slices 2 -- \
#     stepdistill train paper_cqa --workdir gs://BUCKET/cqa --set LAYOUT=hybrid
#
# With EXPECT_DEVICES=32 set, it stops before compiling if the number of devices differs. It does not wait:
# watch with `xpk workload list --cluster C`, end with `xpk workload delete --cluster C --workload W`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
die() { echo "xpk.sh: error: $*" >&2; exit 2; }

cluster='' workload='' type='' image='' build='' slices=1 restarts=10 dry_run='' where=()
while [ $# -gt 0 ]; do
  case $1 in
    --cluster) cluster=${2-}; shift ;;
    --workload) workload=${2-}; shift ;;
    --type) type=${2-}; shift ;;
    --image) image=${2-}; shift ;;
    --build) build=1 ;;
    --num-slices) slices=${2-}; shift ;;
    --zone | --project) where+=("$1=${2-}"); shift ;;
    --max-restarts) restarts=${2-}; shift ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown option '$1'; the command comes after '--' (see --help)" ;;
  esac
  shift || die "an option has no value (see --help)"
done
for name in cluster workload type image; do
  [ -n "${!name}" ] || die "--$name is missing (see --help)"
done
[ $# -gt 0 ] || die "no command after '--', e.g. -- stepdistill train CONFIG --workdir gs://BUCKET/RUN"

call() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

if [ -n "$build" ]; then
  call docker build --file "$here/Dockerfile.tpu" --tag "$image" "$here/.."
  call docker push "$image"
fi
# xpk runs this in a subshell of bash and sends SIGTERM to the subshell: `exec` replaces it by COMMAND
printf -v command '%q ' "$@"
command=". /opt/stepdistill/launch/xla_flags.sh && add_xla_flags tpu && exec ${command% }"
expect=()
[ -z "${EXPECT_DEVICES-}" ] || expect=(--env "EXPECT_DEVICES=$EXPECT_DEVICES")
# exit codes 42 and 127 to 255 always restart, including 134, the SIGABRT of a lost peer
call xpk workload create --cluster "$cluster" --workload "$workload" ${where[@]+"${where[@]}"} \
  "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image" \
  "--max-restarts=$restarts" --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  ${expect[@]+"${expect[@]}"} "--command=$command"

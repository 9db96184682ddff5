#!/usr/bin/env bash
# Runs launch/pretrain.py and other trainings on a Google Cloud TPU pod; see usage
# below and docs/pods.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
Runs launch/pretrain.py, finetune.py, preferences.py or rl.py on all hosts of one
TPU slice or of several.

launch/tpu_pod.sh COMMAND --name NAME --zone ZONE [--project P] [--slices N]
                  [--dry_run] [...]

  create   requests the machines and waits until they are ready
             --type v5p-128 --runtime v2-alpha-tpuv5 [--spot | --reserved]
  install  copies this checkout, without files that git ignores, to ~/maskdiff
           on every host and installs requirements-tpu.txt; repeat to update
  mount    mounts a bucket, or a folder of it, at /gcs/BUCKET[/FOLDER] on every
           host, with gcsfuse
             --bucket BUCKET[/FOLDER]
  start    starts launch/pretrain.py on every host, in the background
             [--env KEY[=VALUE] ...] -- --config configs/8b.py --workdir DIR ...
             --script finetune -- ... starts launch/finetune.py instead, and
             --script preferences or rl -- ... launch/preferences.py or rl.py
           --env KEY takes the value from the environment of this shell, so that
           it is in no command line. The hosts get the values in a file that
           only you can read, and that the start deletes.
  watch    follows the output of the run; control-C ends the watching, not
           the run
  logs     prints the last lines of every host
  status   prints the state of the machines and the hosts that run
  stop     asks the run on every host to save and end, and waits; start with the
           same arguments resumes
             [--grace SECONDS] until a run that has not ended is killed; 300
  delete   ends the run and deletes the machines; asks first unless --yes

--slices N: number of slices, the same for all commands; default 1.
--dry_run prints the gcloud commands without running them.
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Runs a command, or prints it quoted for a shell.
run() {
  if [[ $dry_run == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Runs gcloud compute tpus ... with zone and project.
tpus() {
  local where=("--zone=$zone")
  [[ -z $project ]] || where+=("--project=$project")
  run gcloud compute tpus "$@" "${where[@]}"
}

# Prints the names of the slices. Process 0 runs on worker 0 of the first.
nodes() {
  local i
  if [[ $slices == 1 ]]; then
    echo "$name"
  else
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  fi
}

# Runs a command line on all workers of all slices in parallel.
on_hosts() {
  local node pid pids=() failed=0
  for node in $(nodes); do
    if [[ $dry_run == 1 ]]; then
      tpus tpu-vm ssh "$node" --worker=all "--command=$1"
    else
      tpus tpu-vm ssh "$node" --worker=all "--command=$1" &
      pids+=("$!")
    fi
  done
  # ${x[@]+...} avoids an error for empty arrays in the bash of macOS.
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || failed=1; done
  return "$failed"
}

create() {
  [[ -n $type ]] || fail 'create needs --type, such as v5p-128'
  [[ -n $runtime ]] || fail 'create needs --runtime, such as v2-alpha-tpuv5'
  local more=()
  if [[ $slices == 1 ]]; then
    more+=("--node-id=$name")
  else
    more+=("--node-count=$slices" "--node-prefix=$name")
  fi
  [[ -z $kind ]] || more+=("--$kind")
  tpus queued-resources create "$name" "--accelerator-type=$type" \
    "--runtime-version=$runtime" "${more[@]}"
  [[ $dry_run == 0 ]] || return 0
  local state=''
  while [[ $state != ACTIVE ]]; do
    state=$(tpus queued-resources describe "$name" \
      '--format=value(state.state)')
    echo "$(date +%H:%M:%S) $name: ${state:-unknown}"
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        echo "error: $name was not created; see: gcloud compute tpus" \
          "queued-resources describe $name --zone=$zone" >&2
        return 1
        ;;
      *) sleep 30 ;;
    esac
  done
}

install() {
  local root archive node
  root=$(cd "$(dirname "$0")/.." && pwd)
  if [[ $dry_run == 1 ]]; then
    archive=/tmp/maskdiff.tar.gz
  else
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    archive=$scratch/maskdiff.tar.gz
    # git still lists files that were deleted from the work tree.
    (cd "$root" && git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do
        [[ ! -e $file ]] || printf '%s\0' "$file"
      done | tar --null -T - -czf "$archive")
  fi
  for node in $(nodes); do
    tpus tpu-vm scp "$archive" "$node:" --worker=all
  done
  # The images have Python 3.10; uv installs 3.12.
  on_hosts 'set -e
mkdir -p maskdiff
tar -xzf maskdiff.tar.gz -C maskdiff
cd maskdiff
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d .venv ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt'
}

mount_bucket() {
  [[ -n $bucket ]] || fail 'mount needs --bucket'
  bucket=${bucket#gs://}
  bucket=${bucket%/}
  [[ $bucket =~ ^[A-Za-z0-9][A-Za-z0-9._-]+(/[^/]+)*$ && /$bucket/ != */../* &&
    /$bucket/ != */./* ]] ||
    fail "--bucket $bucket must be BUCKET or BUCKET/FOLDER"
  local quoted source
  quoted=$(printf '%q' "$bucket")
  source=$(printf '%q' "${bucket%%/*}")
  [[ $bucket != */* ]] ||
    source="--only-dir=$(printf '%q' "${bucket#*/}") $source"
  # Saving a checkpoint renames a directory with many files.
  on_hosts "set -e
command -v gcsfuse >/dev/null || {
  echo 'gcsfuse is not installed on this host' >&2
  exit 1
}
mountpoint -q /gcs/$quoted || {
  sudo mkdir -p /gcs/$quoted
  sudo chown \"\$USER\" /gcs/$quoted
  gcsfuse --implicit-dirs --rename-dir-limit=100000 $source /gcs/$quoted
}"
}

# Copies the variables of --env to all hosts, into the file maskdiff.env. Only
# its owner can read it. In a command line, ps would show the values.
send_variables() {
  local node file
  if [[ $dry_run == 1 ]]; then
    file=/tmp/maskdiff.env
  else
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    file=$scratch/maskdiff.env
    (umask 077 && printf 'export %q\n' "${variables[@]}" >"$file")
  fi
  for node in $(nodes); do
    tpus tpu-vm scp "$file" "$node:" --worker=all
  done
}

# setsid gives the run a process group, so that stop ends its children too.
start() {
  [[ $# -gt 0 ]] || fail "start needs the arguments of $script.py after --"
  local environment='' arguments
  if [[ ${#variables[@]} != 0 ]]; then
    send_variables
    # First, so that the file is deleted whatever fails later.
    environment='chmod 600 maskdiff.env && . ./maskdiff.env || exit 1
rm -f maskdiff.env
'
  fi
  arguments=$(printf ' %q' "$@")
  on_hosts "${environment}cd maskdiff || exit 1
if [ -e ../maskdiff.pid ] && kill -0 \"\$(cat ../maskdiff.pid)\" 2>/dev/null
then
  echo 'a run is already active: stop it first' >&2
  exit 1
fi
nohup setsid .venv/bin/python launch/$script.py$arguments \\
  >../maskdiff.log 2>&1 </dev/null &
echo \$! >../maskdiff.pid"
}

watch_run() {
  tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 \
    '--command=tail -n 50 -F maskdiff.log'
}

logs() {
  on_hosts 'echo "== $(hostname)"; tail -n 20 maskdiff.log'
}

status() {
  tpus queued-resources describe "$name" '--format=value(state.state)'
  on_hosts 'if [ -e maskdiff.pid ] && kill -0 "$(cat maskdiff.pid)" 2>/dev/null
then echo "$(hostname) runs"; else echo "$(hostname) does not run"; fi'
}

# The run finishes a step, saves a checkpoint and ends. It is killed if it has
# not ended after $grace seconds.
stop() {
  on_hosts "grace=$grace"'
[ -e maskdiff.pid ] || exit 0
pid=$(cat maskdiff.pid)
kill -TERM -- "-$pid" 2>/dev/null || kill -TERM "$pid" 2>/dev/null
for second in $(seq "$grace"); do
  kill -0 "$pid" 2>/dev/null || break
  [ $((second % 30)) != 0 ] || echo "$(hostname): saving, $second s"
  sleep 1
done
if kill -0 "$pid" 2>/dev/null; then
  echo "$(hostname): killed, since it had not ended after $grace s" >&2
fi
kill -KILL -- "-$pid" 2>/dev/null
rm -f maskdiff.pid'
}

delete() {
  local more=(--force)
  [[ $yes == 0 ]] || more+=(--quiet)
  tpus queued-resources delete "$name" "${more[@]}"
}

[[ $# -gt 0 ]] || {
  usage >&2
  exit 2
}
command=$1
shift
name='' zone='' project='' slices=1 type='' runtime='' kind='' bucket=''
grace=300 dry_run=0 yes=0 variables=() script=pretrain
while [[ $# -gt 0 ]]; do
  case $1 in
    --) break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  case $1 in
    --name | --zone | --project | --slices | --type | --runtime | --bucket | \
      --grace | --env | --script)
      [[ $# -gt 1 ]] || fail "$1 needs a value"
      case $1 in
        --name) name=$2 ;;
        --zone) zone=$2 ;;
        --project) project=$2 ;;
        --slices) slices=$2 ;;
        --type) type=$2 ;;
        --runtime) runtime=$2 ;;
        --bucket) bucket=$2 ;;
        --grace) grace=$2 ;;
        --env) variables+=("$2") ;;
        --script) script=$2 ;;
      esac
      shift 2
      ;;
    --spot | --reserved) kind=${1#--} && shift ;;
    --dry_run) dry_run=1 && shift ;;
    --yes) yes=1 && shift ;;
    --help | -h) usage && exit 0 ;;
    *) fail "unknown argument $1; see launch/tpu_pod.sh --help" ;;
  esac
done
[[ $# == 0 ]] || shift # the --

case $command in
  --help | -h | help) usage && exit 0 ;;
  create | install | mount | start | watch | logs | status | stop | delete) ;;
  *) fail "unknown command $command; see launch/tpu_pod.sh --help" ;;
esac
[[ -n $name ]] || fail "$command needs --name"
[[ -n $zone ]] || fail "$command needs --zone"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices must be 1 or more"
[[ $grace =~ ^[0-9]{1,6}$ ]] ||
  fail "--grace $grace must be a number of seconds"
[[ $script =~ ^(pretrain|finetune|preferences|rl)$ ]] ||
  fail "--script $script must be pretrain, finetune, preferences or rl"
[[ $command == start || $# == 0 ]] ||
  fail "$command takes no arguments after --"
for i in ${variables[@]+"${!variables[@]}"}; do
  key=${variables[i]%%=*}
  [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
    fail "--env $key must be KEY=VALUE, or KEY for a variable of this shell"
  if [[ ${variables[i]} != *=* ]]; then
    printenv "$key" >/dev/null ||
      fail "--env $key: this shell exports no such variable"
    variables[i]=$key=$(printenv "$key")
  fi
done
[[ $dry_run == 1 ]] || command -v gcloud >/dev/null ||
  fail 'gcloud not found: install the Google Cloud CLI and log in'

case $command in
  mount) mount_bucket ;;
  watch) watch_run ;;
  start) start "$@" ;;
  *) "$command" ;;
esac

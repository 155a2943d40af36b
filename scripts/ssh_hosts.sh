#!/usr/bin/env bash
# A recipe on several machines that ssh reaches without a password; no scheduler.
#
#     scripts/ssh_hosts.sh HOSTFILE RECIPE CONFIG LAUNCH [--section.key value ...]
#     scripts/ssh_hosts.sh hosts llama cluster zero3 --training.max_steps 1000
#
# HOSTFILE is DeepSpeed's: a line `name slots=8` for each machine, all with the same number of GPUs; the first one leads. The
# repository, with its .venv, lies in the same folder on all of them. Ctrl-C ends all machines, each after a checkpoint.
# Settings: MASTER_PORT (29500).
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "usage: scripts/ssh_hosts.sh HOSTFILE RECIPE CONFIG LAUNCH [--section.key value ...]" >&2
    exit 2
fi
hostfile=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/resolve.sh
source scripts/resolve.sh
[[ -f $hostfile ]] || fail "there is no host file $hostfile"
resolve "$2" "$3" "$4"
shift 4

hosts=()
slots=""
while read -r host count || [[ -n $host ]]; do # a last line without its end too
    [[ -n $host && $host != \#* ]] || continue
    [[ $count =~ ^slots=([1-9][0-9]*)$ ]] || fail "$hostfile: \`$host $count\` is not \`name slots=N\`"
    [[ -z $slots || $slots == "${BASH_REMATCH[1]}" ]] || fail "$hostfile: all machines need the same number of slots"
    slots=${BASH_REMATCH[1]}
    hosts+=("$host")
done <"$hostfile"
[[ ${#hosts[@]} -gt 0 ]] || fail "$hostfile names no machine"

launcher=(
    "$python" -m accelerate.commands.launch "${settings[@]}"
    --num_machines "${#hosts[@]}" --num_processes $((${#hosts[@]} * slots))
    --main_process_ip "${hosts[0]}" --main_process_port "${MASTER_PORT:-29500}"
)
run="/tmp/recipe-$$" # the launcher's process number on each machine, to stop it by
clients=()

on_every_host() {
    for rank in "${!hosts[@]}"; do ssh -o BatchMode=yes "${hosts[rank]}" "${1//RANK/$rank}" || true; done
}
stop() {
    trap '' INT TERM
    on_every_host "kill -TERM \$(cat $run-RANK) 2>/dev/null"
    wait || true
    on_every_host "rm -f $run-RANK"
    exit "$1"
}
trap 'stop 130' INT TERM

for rank in "${!hosts[@]}"; do
    ssh -o BatchMode=yes "${hosts[rank]}" "echo \$\$ >$run-$rank && cd ${PWD@Q} && \
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT && \
        export OMP_NUM_THREADS=\$(( \$(nproc) / $slots > 0 ? \$(nproc) / $slots : 1 )) && \
        exec ${launcher[*]@Q} --machine_rank $rank $script --config ${config@Q} ${*@Q}" &
    clients+=($!)
done
for _ in "${clients[@]}"; do
    code=0
    wait -n || code=$?
    [[ $code -eq 0 ]] || stop "$code" # one machine failed: the others would wait for it for ever
done
on_every_host "rm -f $run-RANK"

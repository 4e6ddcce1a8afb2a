#!/usr/bin/env bash
# A SLURM cluster (munged, slurmctld and N slurmd) on one machine, for tests: loopback only, no systemd, no cgroups.
#
#   minislurm.sh run N          start, print "ready", wait until standard input closes, then stop
#   minislurm.sh up N | down    start in the background | stop all processes of the cluster
#   minislurm.sh status         nodes and jobs
#   minislurm.sh kill-node I    kill all processes of node I | start-node I: start it again
#
# MINISLURM_ROOT (required, absolute) contains all files; clusters need different roots and ports.
# MINISLURM_PORTS: N+1 free ports, "controller node1 node2 ..."; MINISLURM_FIRST_JOB; MINISLURM_CPUS, MINISLURM_GPUS
# per node (the GPUs are fake device files). Requires root: munged and slurmd switch users.
set -euo pipefail

[[ ${1:-} =~ ^(run|up|down|status|kill-node|start-node)$ ]] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
root=${MINISLURM_ROOT:?set MINISLURM_ROOT to an absolute folder for this cluster}
[[ $root == /* ]] || { echo "minislurm: MINISLURM_ROOT is '$root', expected an absolute path" >&2; exit 2; }
cpus=${MINISLURM_CPUS:-4}
gpus=${MINISLURM_GPUS:-0}
first_job=${MINISLURM_FIRST_JOB:-1}
read -ra ports <<<"${MINISLURM_PORTS:-16817 16818 16819 16820 16821}"

export SLURM_CONF=$root/etc/slurm.conf

wait_for() { # SECONDS COMMAND...: until the command succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || { echo "minislurm: timed out waiting for: $*" >&2; return 1; }
        sleep 0.05
    done
}

daemons() { # [LOG]: ids of this cluster's daemons; they change their names, so they are found by their open log file
    local pid
    for pid in $(find /proc/[0-9]*/fd -lname "$root/log/${1:-*}" 2>/dev/null | cut -d/ -f3 | sort -u); do
        [[ $(readlink "/proc/$pid/exe") =~ /(munged|slurm[a-z]+)(-wlm)?$ ]] && echo "$pid"
    done
    return 0
}

job_processes() { # [NODE]: ids of processes of jobs, found by cluster, job and node in their environment
    local pid
    # shellcheck disable=SC2013  # one id per line
    for pid in $(grep -lzxF -- "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3); do
        grep -qzE "^SLURM_JOB_ID=" "/proc/$pid/environ" 2>/dev/null || continue
        [[ -z ${1:-} ]] || grep -qzx "SLURMD_NODENAME=$1" "/proc/$pid/environ" 2>/dev/null || continue
        [[ $pid == "$$" ]] || echo "$pid"
    done
    return 0
}

kill_all() { # SIGNAL PID...
    local signal=$1
    shift
    (($# == 0)) || kill "-$signal" "$@" 2>/dev/null || true
}

node_lines() { # COUNT
    local i gres=""
    ((gpus == 0)) || gres=" Gres=gpu:$gpus"
    for i in $(seq "$1"); do
        echo "NodeName=node$i NodeAddr=127.0.0.1 Port=${ports[i]} CPUs=$cpus RealMemory=8000$gres"
    done
}

write_configuration() { # COUNT
    local i
    mkdir -p "$root"/{etc,log,state,run}
    chmod 755 "$root" "$root"/{etc,log,state,run} # munged requires that all users can access its socket
    for i in $(seq "$1"); do mkdir -p "$root/spool.node$i"; done
    cat >"$SLURM_CONF" <<CONF
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$root/run/munge.socket
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=10
JobRequeue=1
FirstJobId=$first_job
MinJobAge=3600
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
$( ((gpus == 0)) || echo "GresTypes=gpu")
$(node_lines "$1")
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
    : >"$root/etc/gres.conf"
    if ((gpus > 0)); then # without device files the nodes become INVAL, so each fake is a copy of /dev/null
        for i in $(seq 0 $((gpus - 1))); do
            [[ -c $root/run/nvidia$i ]] || mknod -m 666 "$root/run/nvidia$i" c 1 3
        done
        echo "NodeName=node[1-$1] Name=gpu File=$root/run/nvidia[0-$((gpus - 1))]" >"$root/etc/gres.conf"
    fi
    { cat /etc/hosts; for i in $(seq "$1"); do echo "127.0.0.1 node$i"; done; } >"$root/etc/hosts"
}

start_munged() {
    [[ -s $root/run/munge.key ]] || (umask 077; head -c 1024 /dev/urandom >"$root/run/munge.key")
    munged --key-file="$root/run/munge.key" --socket="$root/run/munge.socket" --pid-file="$root/run/munged.pid" \
        --log-file="$root/log/munged.log" --seed-file="$root/run/munge.seed" </dev/null >>"$root/log/start.log" 2>&1
    wait_for 5 munge -S "$root/run/munge.socket" -n
}

start_node() { # I: with a separate host name and hosts file if the kernel allows it
    if unshare --uts --mount true 2>/dev/null; then
        # The variables are expanded by the inner shell.
        # shellcheck disable=SC2016
        unshare --uts --mount sh -ec \
            'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -N "$1"' sh "node$1" "$root/etc/hosts"
    else
        grep -qE "[[:space:]]node$1([[:space:]]|\$)" /etc/hosts || echo "127.0.0.1 node$1" >>/etc/hosts
        slurmd -N "node$1"
    fi </dev/null >>"$root/log/start.log" 2>&1
}

all_nodes_answer() { # COUNT
    [[ $(sinfo -h -N -o %T | grep -cE '^(idle|mixed|allocated)$') -ge $1 ]]
}

fail_if_running() {
    [[ -z $(daemons) ]] || { echo "minislurm: a cluster is already running in $root" >&2; exit 2; }
}

up() { # COUNT
    local i
    ((${#ports[@]} > $1)) || { echo "minislurm: $1 nodes need $(($1 + 1)) ports in MINISLURM_PORTS" >&2; return 2; }
    write_configuration "$1"
    start_munged
    slurmctld </dev/null >>"$root/log/start.log" 2>&1
    for i in $(seq "$1"); do start_node "$i"; done
    wait_for 20 all_nodes_answer "$1"
}

down() {
    local attempt jobs pids
    # Without a controller, scancel would wait for minutes.
    [[ ! -s $SLURM_CONF ]] || timeout 3 scancel --signal=KILL --full --user="$(id -un)" >/dev/null 2>&1 || true
    for attempt in $(seq 100); do
        mapfile -t jobs < <(job_processes)
        mapfile -t pids < <(daemons)
        ((${#pids[@]} + ${#jobs[@]} > 0)) || return 0
        kill_all KILL "${jobs[@]}"
        if ((attempt < 5)); then kill_all TERM "${pids[@]}"; else kill_all KILL "${pids[@]}"; fi
        sleep 0.1
    done
    echo "minislurm: these processes of $root did not exit: ${pids[*]} ${jobs[*]}" >&2
    return 1
}

kill_node() { # I: slurmd first, so that it cannot report that the others were killed
    local pids
    kill_all KILL "$(cat "$root/run/slurmd.node$1.pid")"
    mapfile -t pids < <(daemons "slurmd.node$1.log"; job_processes "node$1")
    kill_all KILL "${pids[@]}"
}

case $1 in
run)
    fail_if_running
    trap down EXIT
    trap 'exit 143' TERM INT HUP
    up "${2:-2}"
    echo ready
    read -r _ || true # returns when the parent closes the pipe or is killed
    ;;
up)
    fail_if_running
    trap down EXIT # stop a partially started cluster
    up "${2:-2}"
    trap - EXIT
    ;;
down) down ;;
status) sinfo -N -l; squeue ;;
kill-node) kill_node "${2:?missing node number}" ;;
start-node) start_node "${2:?missing node number}" ;;
esac

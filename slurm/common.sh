# Functions sourced by the batch scripts of this folder. The scripts only set resources and start Python.
#
# Environment variables:
#   VLMOE_HOME                the repository (default: the folder in which `sbatch` was called)
#   VLMOE_PYTHON              the Python interpreter (default: .venv of the repository, otherwise python3 in PATH)
#   VLMOE_PROCESSES_PER_NODE  ranks per node (default: the number of allocated GPUs, or 1 without GPUs)
# All other variables (credentials of an object store, NCCL_*, ...) are passed to the ranks and never printed.
# shellcheck shell=bash

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

repository() { # prints the path of the repository
    printf '%s\n' "${VLMOE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
}

python_program() { # prints the interpreter, which must have the same path on every node
    local venv_python
    venv_python=$(repository)/.venv/bin/python
    if [[ -n ${VLMOE_PYTHON:-} ]]; then
        printf '%s\n' "$VLMOE_PYTHON"
    elif [[ -x $venv_python ]]; then
        printf '%s\n' "$venv_python"
    else
        command -v python3 || fail "neither $venv_python nor python3 exists; set VLMOE_PYTHON"
    fi
}

processes_per_node() {
    printf '%s\n' "${VLMOE_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
}

cpus_per_node() {
    printf '%s\n' "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
}

first_host() { # host of rank 0: SLURM numbers the nodes of a job in the order of this list
    scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1
}

master_port() { # differs between most jobs, and is below the ports of outgoing connections
    printf '%s\n' "$((20000 + SLURM_JOB_ID % 10000))"
}

use_log_folder() { # FOLDER: redirects the output of the batch script to FOLDER/JOB.log
    mkdir -p -- "$1"
    printf 'job %s logs to %s\n' "$SLURM_JOB_ID" "$1/$SLURM_JOB_ID*.log"
    exec >>"$1/$SLURM_JOB_ID.log" 2>&1
}

set_python_environment() { # for every Python process of the job
    local processes threads
    processes=$(processes_per_node)
    threads=$(($(cpus_per_node) / processes))
    PYTHONPATH="$(repository)${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    export PYTHONUNBUFFERED=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
}

torchrun_on_all_nodes() { # LOG_FOLDER ARGUMENT...: replaces the script by one torchrun per node
    local logs=$1 python host port processes
    shift
    python=$(python_program)
    host=$(first_host)
    port=$(master_port)
    processes=$(processes_per_node)
    set_python_environment
    printf '%s job %s: %s node(s) x %s process(es), rank 0 on %s:%s, Python %s\n' \
        "$(date --iso-8601=seconds)" "$SLURM_JOB_ID" "$SLURM_JOB_NUM_NODES" "$processes" "$host" "$port" "$python"
    printf 'arguments:'
    printf ' %q' "$@"
    printf '\n'

    # Static rendezvous: global ranks follow the order of nodes, so that adjacent ranks (an expert-parallel group)
    # share a node. The node rank is only known in the tasks, hence the inner shell; `exec` replaces it, so torchrun
    # receives signals. `%` is escaped because it is special in --output. Steps do not inherit --cpus-per-task.
    # shellcheck disable=SC2016
    exec srun --kill-on-bad-exit=1 --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 --cpus-per-task="$(cpus_per_node)" \
        --output="${logs//%/%%}/%j-node%n.log" --open-mode=append \
        bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' \
        "$python" --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" \
        --master-addr="$host" --master-port="$port" "$@"
}

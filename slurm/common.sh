# What the batch scripts of this folder share; they source it. Resources are the scripts' matter, meaning is Python's.
#
# Environment it looks at:
#   VLMOE_HOME                the checkout; without it, the folder in which `sbatch` was called
#   VLMOE_PYTHON              the Python to run; without it, .venv of the checkout, else python3 of the search path
#   VLMOE_PROCESSES_PER_NODE  ranks of a node; without it, its allocated GPUs, or 1 where none are allocated
# Every other variable (credentials of an object store, NCCL_*, ...) is handed to the ranks as it is and never printed.
# shellcheck shell=bash

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

checkout() { # the folder that holds this code
    printf '%s\n' "${VLMOE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
}

python_program() { # the interpreter, which must be the same file on every node
    local own
    own=$(checkout)/.venv/bin/python
    if [[ -n ${VLMOE_PYTHON:-} ]]; then
        printf '%s\n' "$VLMOE_PYTHON"
    elif [[ -x $own ]]; then
        printf '%s\n' "$own"
    else
        command -v python3 || fail "there is no $own and no python3; set VLMOE_PYTHON"
    fi
}

processes_per_node() {
    printf '%s\n' "${VLMOE_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
}

cpus_per_node() {
    printf '%s\n' "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
}

first_host() { # where rank 0 lives; SLURM numbers the nodes of a job in the order of this list
    scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1
}

master_port() { # a port that two jobs on the same nodes hardly share, below those of outgoing connections
    printf '%s\n' "$((20000 + SLURM_JOB_ID % 10000))"
}

use_log_folder() { # FOLDER: from here on the batch script speaks to FOLDER/JOB.log
    mkdir -p -- "$1"
    printf 'job %s logs to %s\n' "$SLURM_JOB_ID" "$1/$SLURM_JOB_ID*.log"
    exec >>"$1/$SLURM_JOB_ID.log" 2>&1
}

use_checkout() { # environment of every Python process of the job
    local processes threads
    processes=$(processes_per_node)
    threads=$(($(cpus_per_node) / processes))
    PYTHONPATH="$(checkout)${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    export PYTHONUNBUFFERED=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
}

torchrun_on_all_nodes() { # LOG_FOLDER ARGUMENT...: becomes one torchrun per node, running ARGUMENT...
    local logs=$1 python host port processes
    shift
    python=$(python_program)
    host=$(first_host)
    port=$(master_port)
    processes=$(processes_per_node)
    use_checkout
    printf '%s job %s: %s node(s) x %s process(es), rank 0 on %s:%s, Python %s\n' \
        "$(date --iso-8601=seconds)" "$SLURM_JOB_ID" "$SLURM_JOB_NUM_NODES" "$processes" "$host" "$port" "$python"
    printf 'arguments:'
    printf ' %q' "$@"
    printf '\n'

    # Static rendezvous: global ranks follow the node order, so that neighboring ranks (an expert-parallel group)
    # share a node. Only the tasks know their node number, hence the shell in between; it is gone after `exec`, and
    # signals reach torchrun itself. `%` would be a pattern in --output. A step does not inherit --cpus-per-task.
    # shellcheck disable=SC2016
    exec srun --kill-on-bad-exit=1 --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 --cpus-per-task="$(cpus_per_node)" \
        --output="${logs//%/%%}/%j-node%n.log" --open-mode=append \
        bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' \
        "$python" --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" \
        --master-addr="$host" --master-port="$port" "$@"
}

#!/usr/bin/env bash
# Makes sure SLURM and munge are installed, from Debian's or Ubuntu's packages (needs root, about 10 s).
# Exit 0: they are there. Exit 1: they are not, and the last line on standard error says what to do.
set -euo pipefail

missing() {
    local program
    for program in sbatch srun slurmctld slurmd munged unshare; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || echo "$program"
    done
}

absent=$(missing | paste -sd' ')
[[ -n $absent ]] || exit 0
if ((EUID != 0)); then
    echo "SLURM is incomplete here (missing: $absent); as root: apt-get install slurm-wlm munge" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "SLURM is incomplete here (missing: $absent) and there is no apt-get; install SLURM and munge by hand" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2 || echo "apt-get update failed; trying the package lists that are here" >&2
apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2 || {
    echo "apt-get could not install slurm-wlm and munge (missing: $absent); its messages are above" >&2
    exit 1
}
absent=$(missing | paste -sd' ')
[[ -z $absent ]] || { echo "slurm-wlm and munge are installed, yet these are missing: $absent" >&2; exit 1; }

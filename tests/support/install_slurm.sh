#!/usr/bin/env bash
# Installs SLURM and munge from Debian's or Ubuntu's packages if necessary (requires root, about 10 s).
# Exit status 0: installed. 1: not installed; the last line on standard error gives the reason and the remedy.
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
    echo "SLURM is not installed (missing: $absent); run as root: apt-get install slurm-wlm munge" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "SLURM is not installed (missing: $absent) and apt-get is not available; install SLURM and munge" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2 || echo "apt-get update failed; using the existing package lists" >&2
apt-get install -y -qq --no-install-recommends slurm-wlm munge >&2 || {
    echo "apt-get could not install slurm-wlm and munge (missing: $absent); see its messages above" >&2
    exit 1
}
absent=$(missing | paste -sd' ')
[[ -z $absent ]] || { echo "slurm-wlm and munge are installed, but these programs are missing: $absent" >&2; exit 1; }

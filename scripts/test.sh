#!/usr/bin/env bash
# All tests; arguments go to pytest (for example: bash scripts/test.sh tests/test_grpo.py -k advantage).
set -u
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
export OMP_NUM_THREADS=1
# Not `python -m pytest`: that would put the checkout on sys.path, where kernels/ shadows another package.
exec .venv/bin/pytest -q -n 2 --dist worksteal "$@"

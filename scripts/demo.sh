#!/usr/bin/env bash
# SCOPE on the embedded tiny models: a progress bar, a small table, and a plot's path. Flags are passed on.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec .venv/bin/python methods/scope_opd.py "$@"

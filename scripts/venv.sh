# Sourced by demo.sh and test.sh: makes .venv beside the sources with requirements.txt in it, once.
# Says in one line what is missing where it can't.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
stop() { echo "error: $*" >&2; exit 2; }

python=""
for candidate in python3 python3.13 python3.12 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$candidate && break
done
[ -n "$python" ] || stop "Python 3.11 or newer is needed; install it and run this again"

stamp=.venv/installed-requirements.txt
if ! cmp -s requirements.txt "$stamp"; then
    if [ ! -x .venv/bin/python ]; then
        "$python" -m venv .venv >/dev/null 2>&1 ||
            stop "$python cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)"
    fi
    echo "Installing requirements.txt into .venv, once; this takes some minutes."
    # torch first and by its exact version: a CPU build that pip already has at hand then satisfies the rest.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)" &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
        stop "pip could not install requirements.txt (its message is above); check the network and run this again"
    cp requirements.txt "$stamp"
fi

# shellcheck shell=bash
# Sourced by the scripts beside it: enters .venv, made from the requirements files given.
# Run again, it installs only what has changed.
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
if [ ! -x .venv/bin/python ]; then
    for python in python3 python3.13 python3.12 python3.11; do
        "$python" -c "$new_enough" 2>/dev/null && break
        python=
    done
    if [ -n "$python" ]; then
        "$python" -m venv .venv
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --python 3.12 .venv
    else
        echo "python3 is $(python3 --version 2>&1); lasad_jax needs 3.11 or later, or uv to get it" >&2
        exit 1
    fi
fi
for requirements in "$@"; do
    stamp=.venv/installed-${requirements//\//-}
    if ! cmp --silent "$requirements" "$stamp"; then
        echo "Installing $requirements into .venv ..."
        .venv/bin/python -m pip install --quiet --requirement "$requirements"
        cp "$requirements" "$stamp"
    fi
done
# shellcheck disable=SC1091
source .venv/bin/activate

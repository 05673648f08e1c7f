# Sourced by the scripts beside it: enters .venv, made from the requirements files given.
# Run again, it installs only what has changed.
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "python3 is $(python3 --version 2>&1); lasad_jax needs 3.11 or later" >&2
    exit 1
}
[ -x .venv/bin/python ] || python3 -m venv .venv
for requirements in "$@"; do
    stamp=.venv/installed-${requirements//\//-}
    if ! cmp --silent "$requirements" "$stamp"; then
        echo "Installing $requirements into .venv ..."
        .venv/bin/python -m pip install --quiet --requirement "$requirements"
        cp "$requirements" "$stamp"
    fi
done
source .venv/bin/activate

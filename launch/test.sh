#!/usr/bin/env bash
# Checks the style of all code and runs every test, in an environment of its own making.
# Arguments go to pytest: bash launch/test.sh tests/test_models.py -k decode
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.txt tests/requirements.txt

ruff format --check .
ruff check .
# A file stays with one process, which so makes its fixtures and programs once.
python -m pytest --numprocesses=2 --dist=loadfile "$@"

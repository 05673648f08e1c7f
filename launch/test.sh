#!/usr/bin/env bash
# Checks the style of all code and runs every test, in an environment of its own making.
# Arguments go to pytest: bash launch/test.sh tests/test_models.py -k decode
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.txt tests/requirements.txt

ruff format --check .
ruff check .
# Each process has its half of the files, and so makes their fixtures and programs once.
python -m pytest --numprocesses=2 --dist=worksteal "$@"

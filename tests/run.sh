#!/usr/bin/env bash
# The tests. Sets up what is missing.   bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/setup.sh
find_python test
# Files side by side: what a file shares is made once. Most of the time one of two is starting ranks.
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"

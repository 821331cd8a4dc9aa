#!/usr/bin/env bash
# The tests. Sets up what is missing.   bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/setup.sh
find_python test
exec "$PYTHON" -m pytest "$@"

# To be sourced. `find_python EXTRA...` leaves in $PYTHON an interpreter that has everything. The
# active one is used as it is when it does (a GPU box, a container); else .venv in the checkout is,
# made and filled from constraints.txt when it is missing or out of date.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

satisfied() { # interpreter, extras...
    local interpreter=$1
    shift
    "$interpreter" "$root/tests/requirements.py" "$@"
}

newest_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "heiretsu needs Python 3.11 or newer, and finds none on PATH; install one" >&2
    return 2
}

fill_venv() { # extras...
    local base extras pins
    base=$(newest_python) || return 2
    extras=$(IFS=,; echo "$*")
    echo "setting up $root/.venv (once)" >&2
    # A torch that is there already is kept: it is the one that fits this machine's driver.
    local -a with=()
    "$base" "$root/tests/requirements.py" --only torch >/dev/null && with=(--system-site-packages)
    if ! "$base" -m venv "${with[@]}" "$root/.venv" >&2; then
        echo "$base cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2
        return 2
    fi
    local python=$root/.venv/bin/python
    pins=$(mktemp)
    cp "$root/constraints.txt" "$pins"
    if "$python" "$root/tests/requirements.py" --only torch >/dev/null; then
        sed -i '/^torch==/d' "$pins"
    else # first and alone, so that nothing else chooses its version
        "$python" -m pip install -q -c "$pins" torch >&2
    fi && "$python" -m pip install -q -c "$pins" -e "$root${extras:+[$extras]}" >&2
    local status=$?
    rm -f "$pins"
    [ $status = 0 ] && return
    echo "the packages could not be installed; pip's own words are above" >&2
    return 2
}

find_python() { # extras...
    if command -v python3 >/dev/null && satisfied python3 "$@" >/dev/null 2>&1; then
        PYTHON=$(command -v python3)
        return
    fi
    PYTHON=$root/.venv/bin/python
    if ! { [ -x "$PYTHON" ] && satisfied "$PYTHON" "$@" >/dev/null; }; then
        fill_venv "$@"
    fi
}

#!/bin/sh
# Set up .venv and the system packages Ichiba uses. Safe to run again; does nothing when all is in place.
set -eu
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-cpu}
TORCH_VERSION=2.13.0

say() { printf 'setup: %s\n' "$*" >&2; }

may_install() { [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; }; }

system_package() { # system_package COMMAND-OR-FILE PACKAGE WHY
    if command -v "$1" >/dev/null 2>&1 || [ -e "$1" ]; then return 0; fi
    if may_install && command -v apt-get >/dev/null 2>&1; then
        say "installing $2 ($3)"
        if [ "$(id -u)" = 0 ]; then root=''; else root='sudo -n'; fi
        { $root apt-get update -qq && $root apt-get install -y -qq $2; } >/dev/null 2>&1 && return 0
    fi
    say "$2 is missing ($3). Install it with:  sudo apt-get install $2"
    return 1
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "Python 3.11 or newer is needed; $PYTHON is $("$PYTHON" -V 2>&1). Try:  make PYTHON=python3.11 $*"
    exit 1
}
# Without bubblewrap the daemon proves a weaker sandbox, says so, and still runs graph jobs: not fatal.
system_package bwrap bubblewrap "the sandbox of strangers' jobs" || true

# Without a compiler exact arithmetic gives the same bits at half the speed: not fatal either.
system_package cc "gcc libc6-dev" "the compiled helpers of exact arithmetic, compression, placement and rounds" || true

stamp=.venv/.installed
wanted="$TORCH $(cat pyproject.toml constraints.txt setup.sh worker/exact/c/* worker/compression/c/* market/c/* | cksum)"
if [ -x .venv/bin/ichiba ] && [ "$(cat $stamp 2>/dev/null || true)" = "$wanted" ]; then exit 0; fi

"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || system_package /nonexistent python3-venv "virtual environments" || exit 1
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

say "installing into .venv (torch $TORCH_VERSION, $TORCH build; a few minutes)"
case $TORCH in
cpu)
    # The CPU build from wherever pip is configured to look, else from PyTorch's own index; never PyPI's CUDA build.
    pip install -q "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
        pip install -q --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH_VERSION+cpu" ;;
cuda) pip install -q "torch==$TORCH_VERSION" ;;
*) say "TORCH is cpu or cuda, not '$TORCH'"; exit 2 ;;
esac
pip install -q setuptools
# fastecdsa (a dependency of libp2p) has wheels for common machines; elsewhere it is compiled.
pip install -q -c constraints.txt -e '.[dev]' || {
    system_package gcc gcc "to compile fastecdsa" || exit 1
    system_package /usr/include/gmp.h libgmp-dev "to compile fastecdsa" || exit 1
    pip install -q -c constraints.txt -e '.[dev]'
}
ls worker/exact/_compiled*.so >/dev/null 2>&1 ||
    say "the compiled helper was not built: same bits, about half the speed. To build it, install gcc and run this again"
ls worker/compression/_compiled*.so >/dev/null 2>&1 ||
    say "the compiled tiles were not built: same bytes, compressed ten times slower. Likewise"
ls market/_placement*.so >/dev/null 2>&1 ||
    say "the compiled moves of placement were not built: same plans, searched 170 times slower. Likewise"
ls market/_rounds*.so >/dev/null 2>&1 ||
    say "the compiled large rounds were not built: same matches, about a fifth of the speed. Likewise"
ls protocol/_signatures*.so >/dev/null 2>&1 ||
    say "the compiled loop over signatures was not built: same answers, fewer a second where many come. Likewise"
printf '%s\n' "$wanted" >$stamp
say "done: .venv/bin/ichiba"

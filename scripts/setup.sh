#!/usr/bin/env bash
# Creates the environment that `make demo` and `make test` run in; the second call returns at once.
#
#   PYTHON      interpreter to build on                       (python3; 3.11 or newer)
#   VENV        folder of the environment                     (.venv)
#   EXTRAS      extras of pyproject.toml, or none             (doom,features,text,launchers,cpu,dev)
#               launchers: many processes here, or jobs on a Slurm cluster (conf/launcher)
#   TORCH       CPU torch for machines without a CUDA torch   (torch==2.13.0)
#   INSTALLER   uv or pip                                     (uv where it runs, otherwise pip)
#
# Where PYTHON already has a CUDA build of torch, the environment sees all packages of PYTHON, and only what is missing
# is installed; its torch, numpy and triton are never replaced. Elsewhere TORCH is installed. On Linux the plain package
# index serves torch with CUDA libraries of several GB: to get the CPU build there, put its wheel in a folder and name
# that in PIP_FIND_LINKS, or, with uv, set UV_TORCH_BACKEND=cpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-doom,features,text,launchers,cpu,dev}
TORCH=${TORCH:-torch==2.13.0}
INSTALLER=${INSTALLER:-}

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# ---- nothing to do? -----------------------------------------------------------------------------------------------
inputs=(pyproject.toml constraints.txt scripts/setup.sh scripts/parent_packages.py)
wanted="$(cat "${inputs[@]}" | cksum) python=$PYTHON extras=$EXTRAS torch=$TORCH in=$PWD"
if [[ -x $VENV/bin/python && -f $VENV/.fastar-ready && "$(< "$VENV/.fastar-ready")" == "$wanted" ]]; then exit 0; fi

case $INSTALLER in "" | uv | pip) ;; *) die "INSTALLER is uv or pip, not '$INSTALLER'" ;; esac

# ---- the interpreter, and the torch that it may have ----------------------------------------------------------------
command -v "$PYTHON" > /dev/null || die "there is no '$PYTHON' here: install Python 3.11 or newer, or name one: make ... PYTHON=/path/to/python3.11"
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "'$PYTHON' does not start: name another with PYTHON=..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || die "fastar needs Python 3.11 or newer and '$PYTHON' is $version: name a newer one, as in PYTHON=python3.11"
PY=$("$PYTHON" -c 'import sys; print(sys.executable)')
prefix=$("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.prefix))')
if [[ -d $VENV && $prefix == "$(cd "$VENV" && pwd -P)" ]]; then # our own environment is active: build on what it was built on
  [[ -f $VENV/.fastar-python ]] || die "'$PYTHON' is the environment $VENV itself: run 'deactivate' first"
  PY=$(< "$VENV/.fastar-python")
fi

parent=$("$PY" scripts/parent_packages.py torch) # "cuda VERSION", "old VERSION", "broken REASON" or "none"
say "$PYTHON is Python $version, torch there: $parent"
case $parent in
  cuda*) mode=parent ;;
  old*) die "fastar needs torch 2.11 or newer and '$PYTHON' has a CUDA build of torch ${parent#old }: upgrade that one, or name a Python without torch with PYTHON=..." ;;
  *) mode=own ;;
esac

# ---- the installer ----------------------------------------------------------------------------------------------------
if [[ $mode == parent ]]; then
  [[ $INSTALLER != uv ]] || say "uv does not see the packages of '$PYTHON': pip installs instead"
  INSTALLER=pip
elif [[ -z $INSTALLER ]]; then
  INSTALLER=pip
  if uv --version > /dev/null 2>&1; then INSTALLER=uv; fi
fi

# ---- the environment; one left half-made, or made on another interpreter, is made again --------------------------------
how="$PY $version $mode"
options=()
if [[ -e $VENV ]]; then
  [[ -f $VENV/.fastar-how ]] || die "$VENV was not made by this script: remove it, or name another folder with VENV=..."
  if [[ -f $VENV/.fastar-begun || "$(< "$VENV/.fastar-how")" != "$how" ]]; then options=(--clear); fi
  if ! "$VENV/bin/python" -c '' 2> /dev/null; then options=(--clear); fi
fi
mark() {
  mkdir -p "$VENV"
  touch "$VENV/.fastar-begun"
  rm -f "$VENV/.fastar-ready"
  printf '%s' "$how" > "$VENV/.fastar-how"
  printf '%s' "$PY" > "$VENV/.fastar-python"
}
if [[ ! -e $VENV || ${#options[@]} -gt 0 ]]; then
  say "creating $VENV"
  mark # before and after: --clear takes the marks away
  [[ $INSTALLER == pip ]] || options+=(--without-pip)
  "$PY" -m venv ${options[@]+"${options[@]}"} "$VENV" \
    || die "'$PYTHON' cannot make an environment: on Debian and Ubuntu install the package python3-venv"
fi
mark
[[ $mode == own ]] || "$PY" scripts/parent_packages.py link "$VENV"

# ---- the packages -----------------------------------------------------------------------------------------------------
project=(-e ".[$EXTRAS]")
[[ $EXTRAS != none ]] || project=(-e .)
# uv does not read pip's settings
find_links=${PIP_FIND_LINKS:-$("$PY" -m pip config get global.find-links 2> /dev/null || true)}

install_uv() {
  local links=() folder
  for folder in $find_links; do links+=(--find-links "$folder"); done
  uv pip install --python "$VENV/bin/python" ${links[@]+"${links[@]}"} -c constraints.txt "$TORCH" "${project[@]}"
}

install_pip() {
  "$VENV/bin/python" -m pip --version > /dev/null 2>&1 || "$VENV/bin/python" -m ensurepip > /dev/null \
    || die "'$PYTHON' comes without pip: on Debian and Ubuntu install the package python3-venv"
  local pip=("$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check)
  if [[ $mode == parent ]]; then
    "$PY" scripts/parent_packages.py constraints constraints.txt > "$VENV/parent-constraints.txt"
    "${pip[@]}" -c "$VENV/parent-constraints.txt" "${project[@]}"
  else
    "${pip[@]}" -c constraints.txt "$TORCH" "${project[@]}"
  fi
}

say "installing with $INSTALLER (1.6 GB on disk, a few minutes on a slow line)"
case $INSTALLER in
  uv) install_uv || { say "uv could not install the packages (reason above), trying pip"; install_pip; } ;;
  pip) install_pip ;;
esac

# ---- does it work, and is torch the one that it should be? ------------------------------------------------------------
"$VENV/bin/python" scripts/parent_packages.py check "$parent"
rm -f "$VENV/.fastar-begun"
printf '%s' "$wanted" > "$VENV/.fastar-ready"

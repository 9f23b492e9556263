#!/usr/bin/env bash
# Make one virtual environment for each tool, with the same torch and transformers in all of them.
# Usage: setup_environments.sh DIRECTORY [ours|mergekit|mixturekit ...]
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 DIRECTORY [ours|mergekit|mixturekit ...]" >&2
    exit 2
fi
directory=$1
shift
if [ $# -eq 0 ]; then
    set -- ours mergekit mixturekit
fi

python=${PYTHON:-python3}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
common=("torch==${TORCH_VERSION:-2.13.0}" "transformers==${TRANSFORMERS_VERSION:-5.23.0}" "safetensors==0.8.0")

for tool in "$@"; do
    case $tool in
        ours) requirements=(-e "$repository") ;;
        mergekit) requirements=("mergekit==0.1.5") ;;
        mixturekit) requirements=("MixtureKit==1.1.1") ;;
        *)
            echo "unknown tool: $tool" >&2
            exit 2
            ;;
    esac
    "$python" -m venv "$directory/$tool"
    # One call, so that pip resolves the tool's own pins together with ours and fails when they conflict.
    "$directory/$tool/bin/python" -m pip install --quiet "${common[@]}" "${requirements[@]}"
    "$directory/$tool/bin/python" -m pip check
done

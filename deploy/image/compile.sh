#!/bin/sh
# Compiles the static program and lays out the image's files. The Dockerfile runs it; so does deploy/tests/test_image.py.
#
#   compile.sh amd64|arm64 FOLDER
set -eu

case $1 in
    amd64) machine=x86_64 ;;
    arm64) machine=aarch64 ;;
    *) echo "compile: no such platform: $1; give amd64 or arm64" >&2; exit 2 ;;
esac
image=$2
target=$machine-unknown-linux-musl

rustup target add "$target"
# clang makes code for any machine, against musl's own headers; Rust brings musl's library and start files.
variable=$(echo "$target" | tr - _)
export "CC_$variable=clang" "AR_$variable=llvm-ar"
export "CFLAGS_$variable=--target=$machine-linux-musl -nostdinc -isystem $(clang -print-resource-dir)/include -isystem /usr/include/$machine-linux-musl"
# shellcheck disable=SC2155
export "CARGO_TARGET_$(echo "$variable" | tr '[:lower:]' '[:upper:]')_LINKER=rust-lld"

cargo build --release --locked --package shroud --target "$target"

mkdir -p "$image/usr/bin" "$image/run" "$image/var"
cp "${CARGO_TARGET_DIR:-target}/$target/release/shroud" "$image/usr/bin/shroud"
ln -sf shroud "$image/usr/bin/kubectl-shroud"
# Where `wg` looks for the userspace data plane's socket.
ln -sfn ../run "$image/var/run"

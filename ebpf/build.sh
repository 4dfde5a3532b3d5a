#!/usr/bin/env bash
# Builds the gate's BPF object, gate.o, which is checked in so that a plain `cargo build` needs neither nightly Rust nor LLVM.
#
#   ebpf/build.sh           rebuild gate.o and gate.o.sources
#   ebpf/build.sh --check   rebuild elsewhere and fail if what is checked in is not the same, byte for byte
#
# The bytes depend on the sources, the compiler and the linker, never on where the checkout or CARGO_HOME lies.
set -euo pipefail
shopt -s inherit_errexit

nightly_commit=e50aa6fba4e63ab34c72bf9acfd2c307c1155d1a # 1.97.0-nightly (2026-05-19)
nightly=nightly-2026-05-20
bpf_linker=0.13.0
llvm=22

cd "$(dirname "$0")"
here=$PWD
say() { echo "ebpf/build.sh: $*" >&2; }

# The sources that make the object, in a fixed order; src/object.rs computes the same and compares it in a test.
sources() {
  LC_ALL=C find build.sh common/Cargo.toml common/src program/Cargo.toml program/Cargo.lock program/src -type f -print | LC_ALL=C sort
}
sources_hash() {
  sources | xargs sha256sum | sha256sum | cut -d' ' -f1
}

# Any installed toolchain of the right commit will do, whatever it is called.
toolchain() {
  local name
  for name in $(rustup toolchain list | cut -d' ' -f1); do
    if [[ $(RUSTUP_TOOLCHAIN=$name rustc -Vv 2>/dev/null || true) == *"commit-hash: $nightly_commit"* ]]; then
      echo "$name"
      return
    fi
  done
  say "installing $nightly"
  rustup toolchain install "$nightly" --profile minimal --no-self-update >&2
  echo "$nightly"
}

linker() {
  if [[ $(bpf-linker --version 2>/dev/null || true) == "bpf-linker $bpf_linker" ]]; then return; fi
  if [ ! -d "/usr/lib/llvm-$llvm/include" ]; then
    say "installing llvm-$llvm-dev"
    if [ "$(id -u)" = 0 ]; then apt-get install -y --no-install-recommends "llvm-$llvm-dev" >&2
    else sudo apt-get install -y --no-install-recommends "llvm-$llvm-dev" >&2; fi
  fi
  say "installing bpf-linker $bpf_linker"
  LLVM_PREFIX=/usr/lib/llvm-$llvm PATH=/usr/lib/llvm-$llvm/bin:$PATH \
    cargo install bpf-linker --version "$bpf_linker" --locked --no-default-features --features "llvm-$llvm" >&2
}

# Prints the path of the new object.
build() {
  local sysroot flags separator=$'\x1f'
  export RUSTUP_TOOLCHAIN
  RUSTUP_TOOLCHAIN=$(toolchain)
  sysroot=$(rustc --print sysroot)
  if [ ! -d "$sysroot/lib/rustlib/src/rust/library" ]; then
    say "installing rust-src for $RUSTUP_TOOLCHAIN"
    rustup component add rust-src --toolchain "$RUSTUP_TOOLCHAIN" >&2
  fi
  linker
  flags=(
    --cfg 'bpf_target_arch="x86_64"' # only kprobe argument access depends on it, which the gate has none of
    -C linker=bpf-linker -C debuginfo=0
    "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
    "--remap-path-prefix=$sysroot=/rust"
    "--remap-path-prefix=$here=/shroud/ebpf"
  )
  CARGO_ENCODED_RUSTFLAGS=$(IFS=$separator; echo "${flags[*]}")
  export CARGO_ENCODED_RUSTFLAGS
  (cd program && env -u RUSTFLAGS -u RUSTC -u RUSTC_WRAPPER -u RUSTC_WORKSPACE_WRAPPER cargo build --locked --release --quiet \
    --target bpfel-unknown-none -Z build-std=core --target-dir "$1") >&2
  echo "$1/bpfel-unknown-none/release/gate"
}

case "${1-}" in
  "")
    object=$(build "$here/program/target")
    cp "$object" gate.o
    chmod 644 gate.o
    sources_hash > gate.o.sources
    say "gate.o is $(sha256sum gate.o | cut -c1-16), sources $(cut -c1-16 gate.o.sources)"
    ;;
  --check)
    object=$(build "$here/program/target")
    if [ "$(sources_hash)" != "$(cat gate.o.sources)" ] || ! cmp "$object" gate.o; then
      say "gate.o is stale: run ebpf/build.sh (make ebpf) and commit gate.o and gate.o.sources"
      exit 1
    fi
    say "gate.o is what its sources make"
    ;;
  *)
    say "unknown argument $1; give none, or --check"
    exit 2
    ;;
esac

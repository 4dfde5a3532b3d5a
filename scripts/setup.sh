#!/usr/bin/env bash
# Installs what a fresh Debian or Ubuntu machine lacks, and says what it does. A second run finds everything and is quick.
#
#   scripts/setup.sh build     compile Shroud (pinned stable Rust, a C compiler)
#   scripts/setup.sh demo      the above, and what `make demo` looks through (iproute2, wireguard-tools)
#   scripts/setup.sh deploy    what the tests of deploy/ run on (Helm's engine and other Python packages, kubectl, musl)
#   scripts/setup.sh test      all of the above, and the peers and eyes of the tests (wireguard-go, boringtun-cli, CNI plugins, bpftool, strace, cargo-deny)
#   scripts/setup.sh vm        the above, and an emulator with small tools for its guests (qemu, busybox)
#   scripts/setup.sh fuzz      compile Shroud, and cargo-fuzz (scripts/fuzz.sh finds the nightly Rust it needs)
#
# What rebuilds the gate's BPF object, ebpf/build.sh installs itself.
set -euo pipefail
cd "$(dirname "$0")/.."

goal=${1:?usage: scripts/setup.sh build|demo|deploy|test|vm|fuzz}
tools=${SHROUD_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/shroud/tools}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# apt_install PACKAGE...: installs those that are missing.
apt_install() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || die "please install by hand (no apt-get here): ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

rust() {
    command -v rustup >/dev/null || die "rustup is missing: install it from https://rustup.rs, then run this again"
    local channel
    channel=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
    if ! rustup toolchain list | grep -q "^$channel-"; then
        say "installing Rust $channel"
        rustup toolchain install "$channel" --profile minimal >&2
    fi
    local component
    for component in clippy rustfmt; do
        rustup component list --toolchain "$channel" --installed | grep -q "^$component" && continue
        say "installing $component for Rust $channel"
        rustup component add --toolchain "$channel" "$component" >&2
    done
}

# cargo_tool CRATE VERSION: builds a program from the Rust registry into $tools/bin.
cargo_tool() {
    local crate=$1 version=$2
    [ -e "$tools/$crate-$version" ] && return
    say "building $crate $version (once, some minutes)"
    cargo install --quiet --locked --root "$tools" "$crate" --version "$version" >&2
    touch "$tools/$crate-$version"
}

build() {
    apt_install build-essential ca-certificates
    rust
}

demo() {
    build
    apt_install iproute2 wireguard-tools
}

deploy() {
    build
    apt_install iproute2 musl-tools procps python3 python3-venv util-linux
    command -v kubectl >/dev/null || apt_install kubernetes-client
    local target=x86_64-unknown-linux-musl list=deploy/tests/requirements.txt
    if ! rustup target list --installed | grep -qx "$target"; then
        say "installing Rust's standard library for $target"
        rustup target add "$target" >&2
    fi
    cmp -s "$list" "$tools/deploy/installed" && return
    say "installing Helm's engine and what else $list names"
    rm -rf "$tools/deploy"
    python3 -m venv "$tools/deploy"
    "$tools/deploy/bin/pip" install --quiet --disable-pip-version-check --require-hashes --requirement "$list" >&2
    cp "$list" "$tools/deploy/installed"
}

tests() {
    demo
    deploy
    apt_install bpftool containernetworking-plugins iputils-ping nftables procps strace tcpdump wireguard-go
    cargo_tool boringtun-cli 0.7.1
    cargo_tool cargo-deny 0.20.2
}

case $goal in
    build) build ;;
    demo) demo ;;
    deploy) deploy ;;
    test) tests ;;
    vm)
        tests
        apt_install binutils busybox-static qemu-system-x86 xz-utils
        ;;
    fuzz)
        build
        cargo_tool cargo-fuzz 0.13.2
        ;;
    *) die "unknown goal $goal" ;;
esac

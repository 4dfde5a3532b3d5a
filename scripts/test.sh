#!/usr/bin/env bash
# Everything that must hold before a change lands, in the order in which failures are cheapest. `make test` and CI run this.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=${SHROUD_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/shroud/tools}
export SHROUD_TOOLS=$tools PATH="$tools/bin:$PATH"
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
# A failed assertion's message is what helps; anyhow's backtraces bury it.
export RUST_LIB_BACKTRACE=0
started=$SECONDS

stage() {
    local name=$1 begun=$SECONDS
    shift
    printf '\n== %s (%s)\n' "$name" "$*"
    "$@"
    printf '== %s: ok, %d s\n' "$name" $((SECONDS - begun))
}

[ "$(id -u)" -eq 0 ] || { echo "test: the namespace scenarios need root: run 'sudo make test'" >&2; exit 1; }

stage setup scripts/setup.sh test
stage format cargo fmt --all --check
stage lint cargo clippy --workspace --all-targets --locked -- -D warnings
stage documentation env RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items --locked --quiet
stage dependencies cargo deny --log-level error check bans licenses sources
stage gate-object ebpf/build.sh --check
stage tests cargo test --workspace --locked --no-fail-fast -- --test-threads=2
stage deploy deploy/test.sh
stage kernels scripts/test-vm.sh
stage demo make --no-print-directory demo
stage demo-k8s make --no-print-directory demo-k8s

printf '\nall green in %d s\n' $((SECONDS - started))

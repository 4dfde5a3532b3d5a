#!/usr/bin/env bash
# Looks for inputs that break what fuzz/src promises, and keeps a few that together reach all the code that was reached.
#
#   scripts/fuzz.sh                       every target, a minute each
#   scripts/fuzz.sh announcement 3600     one target, for an hour
#
# What it finds on the way stays in fuzz/target; a finding lands in fuzz/artifacts, and this says how to look at it.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

target=${1:-}
seconds=${2:-60}
tools=${SHROUD_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/shroud/tools}
PATH="$tools/bin:$PATH"

say() { printf 'fuzz: %s\n' "$*" >&2; }

# pin NAME: what ebpf/build.sh pins; the gate's nightly will do here too.
pin() { sed -n "s/^$1=\([^ ]*\).*/\1/p" ebpf/build.sh; }

# Any installed toolchain of the right commit will do, whatever it is called.
toolchain() {
    local commit nightly name
    commit=$(pin nightly_commit)
    for name in $(rustup toolchain list | cut -d' ' -f1); do
        if [[ $(RUSTUP_TOOLCHAIN=$name rustc -Vv 2>/dev/null || true) == *"commit-hash: $commit"* ]]; then
            echo "$name"
            return
        fi
    done
    nightly=$(pin nightly)
    say "installing Rust $nightly"
    rustup toolchain install "$nightly" --profile minimal --no-self-update >&2
    echo "$nightly"
}

# run TARGET DIRECTORY... -- OPTION...: libFuzzer with what holds for every run. An input that takes long or much memory is a finding,
# so that AddressSanitizer keeps little freed memory itself. All lengths are tried from the beginning: a history of few bytes is short.
run() {
    local name=$1
    shift
    ASAN_OPTIONS=quarantine_size_mb=32 cargo fuzz run "$name" "$@" \
        -rss_limit_mb=512 -timeout=25 -len_control=0 -print_final_stats=1 ${dictionary:+"-dict=$dictionary"}
}

# fuzz TARGET: looks for `seconds`, then keeps what is worth keeping.
fuzz() {
    local name=$1 corpus=fuzz/corpus/$1 seen=fuzz/target/seen/$1 kept=fuzz/target/kept/$1 dictionary=
    if [ -f "fuzz/dictionaries/$name" ]; then dictionary=fuzz/dictionaries/$name; fi
    mkdir -p "$corpus/found" "$seen"

    say "$name: looking for $seconds s from $(find "$corpus" -type f | wc -l) files"
    if ! run "$name" "$seen" "$corpus" -- "-max_total_time=$seconds"; then
        say "$name: a promise of fuzz/src/$name.rs is broken (or the run was interrupted). The input is in fuzz/artifacts/$name."
        say "To make it small, and to see why:"
        say "  PATH=$tools/bin:\$PATH cargo +$RUSTUP_TOOLCHAIN fuzz tmin $name fuzz/artifacts/$name/FILE"
        say "  PATH=$tools/bin:\$PATH cargo +$RUSTUP_TOOLCHAIN fuzz run $name fuzz/artifacts/$name/FILE"
        exit 1
    fi

    # What reaches code that the handwritten files do not, named by its content.
    rm -rf "$kept"
    mkdir -p "$kept"
    find "$corpus" -maxdepth 1 -type f -exec cp -t "$kept" {} +
    run "$name" "$kept" "$corpus/found" "$seen" -- -set_cover_merge=1 -use_counters=0
    find "$corpus" -maxdepth 1 -type f -printf '%f\0' | (cd "$kept" && xargs -0 --no-run-if-empty rm)
    rm -r "$corpus/found"
    mv "$kept" "$corpus/found"
    say "$name: no finding; $(find "$corpus/found" -type f | wc -l) files in $corpus/found, $(du -sb "$corpus/found" | cut -f1) bytes"
}

scripts/setup.sh fuzz
RUSTUP_TOOLCHAIN=$(toolchain)
export RUSTUP_TOOLCHAIN
# What is fuzzed is what is shipped, down to the dependencies' versions.
if [ ! fuzz/Cargo.lock -nt Cargo.lock ]; then cp Cargo.lock fuzz/Cargo.lock; fi

if [ -n "$target" ]; then
    fuzz "$target"
else
    for target in $(cargo fuzz list); do fuzz "$target"; done
fi

#!/usr/bin/env bash
# Runs the kernel tests and scenarios on the kernels people have, in an emulator. Installs what it lacks and says so.
#
#   scripts/test-vm.sh                 the core suites on Linux 6.1 and 6.12
#   scripts/test-vm.sh --kernel 6.12 --only gate --test verdicts
#   FULL=1 scripts/test-vm.sh          every suite
#   scripts/test-vm.sh --bench         what thousands of peers take, in the kernel and in user space
#
# The kernels are Debian's packages, unpacked into a cache; nothing is installed into /boot.
set -euo pipefail
cd "$(dirname "$0")/.."

kernels=${XDG_CACHE_HOME:-$HOME/.cache}/shroud/kernels

say() { printf 'test-vm: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Debian's package of a kernel series: the image that the series' meta package depends on.
package_of() {
    apt-cache depends "$1" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1
}

# fetch SERIES META-PACKAGE: unpacks a kernel and its modules into $kernels/SERIES.
fetch() {
    local series=$1 meta=$2 package folder
    [ -e "$kernels/$series/complete" ] && return
    package=$(package_of "$meta")
    if [ -z "$package" ]; then
        say "refreshing apt's lists, to find $meta"
        apt-get update -qq
        package=$(package_of "$meta")
    fi
    [ -n "$package" ] || die "apt knows no $meta: is this Debian 12, with its updates and security suites?"
    say "fetching Linux $series ($package)"
    folder=$(mktemp -d)
    chmod 755 "$folder"
    (cd "$folder" && apt-get download -qq "$package") >&2
    rm -rf "${kernels:?}/$series"
    mkdir -p "$kernels/$series"
    dpkg-deb -x "$folder"/*.deb "$kernels/$series"
    rm -rf "$folder"
    touch "$kernels/$series/complete"
}

scripts/setup.sh vm
fetch 6.1 linux-image-amd64
fetch 6.12 linux-image-6.12-amd64
cargo build --quiet --locked --package shroud-vm
exec "${CARGO_TARGET_DIR:-target}/debug/vm" --kernels "$kernels" ${FULL:+--full} "$@"

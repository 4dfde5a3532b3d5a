#!/usr/bin/env bash
# Tests what is in deploy/: the chart through Helm's own engine, the kustomize base, rights, alerts, image, and the agent in its pod.
#
#   deploy/test.sh                     all of it, as root
#   deploy/test.sh test_rights         one file of deploy/tests
#   UPDATE=1 deploy/test.sh            writes deploy/golden and the kustomize base anew: look at what changes
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh deploy
cargo build --quiet --locked --package shroud
export SHROUD_BINARY=${CARGO_TARGET_DIR:-$PWD/target}/debug/shroud
tools=${SHROUD_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/shroud/tools}
export PATH="$tools/deploy/bin:$PATH" PYTHONDONTWRITEBYTECODE=1
cd deploy/tests
if [ $# -eq 0 ]; then set -- discover; fi
exec python -m unittest "$@"

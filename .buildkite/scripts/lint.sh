#!/usr/bin/env bash
# Formats and lints of everything.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
ci/cache restore
exec scripts/lint.sh

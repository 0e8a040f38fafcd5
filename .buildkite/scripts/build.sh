#!/usr/bin/env bash
# Builds all, runs the unit tests, and packs what the integration tests need.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
ci/cache restore
# Also when a test fails: what was built is as good for the next build.
trap 'ci/cache save || true' EXIT
scripts/test --without-vms
ci/package --out target/ci/package.tar.zst

#!/usr/bin/env bash
# Builds all, runs the unit tests, and packs what the integration tests need.
# shellcheck source=.buildkite/scripts/step.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/step.sh"
ci/cache restore
# Also when a test fails: what was built is as good for the next build.
trap 'give_back; ci/cache save || true' EXIT
scripts/test --without-vms
ci/package --out target/ci/package.tar.zst

#!/usr/bin/env bash
# The integration tests in an inner VM, on the package of the build step. What they leave is in artifacts/, passed or not.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
package=target/ci/package.tar.zst
if [[ -n ${BUILDKITE_BUILD_ID:-} ]]; then
  mkdir -p target/ci
  buildkite-agent artifact download "$package" . --step build
fi
if ((EUID != 0)); then exec sudo -E -- ci/run-local --package "$package" --artifacts artifacts "$@"; fi
exec ci/run-local --package "$package" --artifacts artifacts "$@"

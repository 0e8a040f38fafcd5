#!/usr/bin/env bash
# The integration tests in an inner VM, on the package of the build step. What they leave is in artifacts/, passed or not.
# shellcheck source=.buildkite/scripts/step.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/step.sh"
package=target/ci/package.tar.zst
# In a subshell: the library has traps of its own.
(
  # shellcheck source=scripts/lib/common.sh
  source scripts/lib/common.sh
  # shellcheck source=scripts/lib/packages.sh
  source scripts/lib/packages.sh
  need_packages "${image_needs[@]}" "${vm_needs[@]}"
)
# The golden image takes Firecracker from the assets, and the checkout begins without any.
ci/cache restore assets
if [[ -n ${BUILDKITE_BUILD_ID:-} ]]; then
  mkdir -p target/ci
  buildkite-agent artifact download "$package" . --step build
fi
as_root=()
if ((EUID != 0)); then as_root=(sudo -E --); fi
"${as_root[@]}" ci/run-local --package "$package" --artifacts artifacts "$@"

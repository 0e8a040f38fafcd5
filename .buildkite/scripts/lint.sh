#!/usr/bin/env bash
# Formats and lints of everything.
# shellcheck source=.buildkite/scripts/step.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/step.sh"
ci/cache restore
scripts/lint.sh

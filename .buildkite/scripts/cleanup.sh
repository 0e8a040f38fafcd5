#!/usr/bin/env bash
# Inner VMs whose run ended without removing them: a killed agent, a lost connection.
# shellcheck source=.buildkite/scripts/step.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/step.sh"
if ((EUID == 0)); then ci/inner-vm sweep; else sudo -E -- ci/inner-vm sweep; fi

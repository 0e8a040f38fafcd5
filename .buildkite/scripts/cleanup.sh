#!/usr/bin/env bash
# Inner VMs whose run ended without removing them: a killed agent, a lost connection.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
if ((EUID != 0)); then exec sudo -E -- ci/inner-vm sweep; fi
exec ci/inner-vm sweep

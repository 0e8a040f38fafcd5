# shellcheck shell=bash
# What each step begins with. Sourced, never run.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

# What root made in the checkout (through sudo) becomes the agent's: the next job begins with a `git clean`, which removes
# nothing from another's directories, and its checkout would fail. The agent is whoever the checkout belongs to.
give_back() {
  local owner as_root=()
  owner=$(stat -c %u:%g .)
  if ((EUID != 0)); then as_root=(sudo --); fi
  "${as_root[@]}" find . -xdev ! -uid "${owner%:*}" -exec chown -h -- "$owner" {} + ||
    echo "warning: files of root's stay in the checkout; the next job may not be able to remove them" >&2
}
# A script that ends by `exec` would never come to this.
trap give_back EXIT
# A cancelled job: the running command has been told, too, and is waited for.
trap 'exit 143' TERM

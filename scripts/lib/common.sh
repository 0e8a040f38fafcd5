# shellcheck shell=bash
# What every script here shares: where things are, how progress is shown, how to become root. Sourced, never run.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
target=${CARGO_TARGET_DIR:-$repo/target}
# The image store (docs: assets/README.md). Another one can be named, as the server's --image-dir can.
assets=${CLAWPOT_IMAGE_DIR:-$repo/assets}
export PATH="$PATH:/usr/sbin:/sbin"
export DEBIAN_FRONTEND=noninteractive

say() { printf '%s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }

# die WHAT [NEXT]: which thing failed and why; what to do about it.
die() {
  printf 'error: %s\n' "$1" >&2
  if (($# > 1)); then printf '  next: %s\n' "$2" >&2; fi
  exit 1
}

# help_asked "$@": prints the comment at the top of the running script and ends, where --help is the first argument.
help_asked() {
  case ${1:-} in
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
  esac
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  else
    command -v sudo >/dev/null || die "this needs root and there is no sudo" "run it as root, or install sudo"
    sudo -- "$@"
  fi
}

# seconds_since MICROSECONDS: "3.2", from an earlier ${EPOCHREALTIME/[.,]/}.
seconds_since() {
  local now=${EPOCHREALTIME/[.,]/}
  printf '%d.%d' $(((now - $1) / 1000000)) $((((now - $1) / 100000) % 10))
}

last_line() { tail -c 2000 -- "$1" 2>/dev/null | tr '\r' '\n' | tr -dc '[:print:]\n' | awk 'NF { line = $0 } END { print line }' 2>/dev/null; }

# Shows that a step is still going: on a terminal one line redrawn each second, elsewhere a line every 15 s.
step_ticker() {
  local label=$1 log=$2 start=$SECONDS elapsed idle
  trap '' INT
  # Waiting without a child that could outlive us: reading from a pipe that nobody writes to.
  exec {idle}<> <(:)
  while kill -0 "$$" 2>/dev/null; do
    read -r -t 1 -u "$idle" || true
    elapsed=$((SECONDS - start))
    if [[ -t 2 ]]; then
      printf '\r\033[K… %s  %ds  %.*s' "$label" "$elapsed" "$((${COLUMNS:-100} - ${#label} - 12))" "$(last_line "$log")" >&2
    elif ((elapsed > 0 && elapsed % 15 == 0)); then
      printf '… %s  %ds  %.100s\n' "$label" "$elapsed" "$(last_line "$log")" >&2
    fi
  done
}

ticker="" step_log=""
stop_ticker() {
  if [[ -n $ticker ]]; then
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    ticker=""
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
  fi
}

# step LABEL CMD…: runs CMD with its output in a log, progress and duration on stderr; a failure shows the log's end.
# CMD runs in a subshell: it cannot set the caller's variables. Call it as a plain statement, never in a condition,
# where bash would switch `set -e` off inside CMD.
step() {
  local label=$1 begun=${EPOCHREALTIME/[.,]/} status=0 log
  shift
  log=$(mktemp -t clawpot-step.XXXXXX)
  step_log=$log
  if [[ ! -t 2 ]]; then printf '… %s\n' "$label" >&2; fi
  step_ticker "$label" "$log" &
  ticker=$!
  set +e
  (
    set -e
    "$@"
  ) >"$log" 2>&1 </dev/null
  status=$?
  set -e
  stop_ticker
  if ((status != 0)); then
    printf '✗ %s  %s s  (exit status %d); the last of what it said:\n' "$label" "$(seconds_since "$begun")" "$status" >&2
    tail -n 40 -- "$log" | sed 's/^/  | /' >&2
    rm -f -- "$log"
    return "$status"
  fi
  printf '✓ %s  %s s%s\n' "$label" "$(seconds_since "$begun")" "$(step_note "$log")" >&2
  rm -f -- "$log"
}

# For EXIT traps: nothing of a step that was interrupted stays.
abandon_step() {
  stop_ticker
  if [[ -n $step_log ]]; then rm -f -- "$step_log"; fi
}
trap abandon_step EXIT

# A step's last line of the form "note: …" is worth showing although the rest of its log is not.
step_note() { sed -n 's/^note: /  (/p' -- "$1" | tail -n 1 | sed 's/$/)/'; }

# The repository's language: the version of Rust that Cargo.toml asks for.
rust_wanted() { sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$repo/Cargo.toml" | head -n 1; }

# The person behind sudo: what is built belongs to them, and their toolchain is the one to use.
builder() {
  if ((EUID == 0)) && [[ -n ${SUDO_USER:-} && $SUDO_USER != root && $(stat -c %U "$repo") == "$SUDO_USER" ]]; then
    printf '%s' "$SUDO_USER"
  fi
}

# as_builder CMD…, with cargo on PATH wherever rustup put it.
as_builder() {
  local user home
  user=$(builder)
  if [[ -n $user ]]; then
    home=$(getent passwd "$user" | cut -d: -f6)
    sudo -u "$user" -E -H -- env PATH="$home/.cargo/bin:$PATH" HOME="$home" "$@"
  else
    PATH="$PATH:${HOME:-/root}/.cargo/bin" "$@"
  fi
}

cargo_run() { as_builder cargo "$@"; }

need_rust() {
  local wanted found
  wanted=$(rust_wanted)
  if ! found=$(cargo_run --version 2>/dev/null); then
    die "Rust is not installed (cargo is neither on PATH nor in ~/.cargo/bin); $wanted or newer is needed" \
      "install rustup as https://rustup.rs says (curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh), then run this again"
  fi
  found=$(cut -d' ' -f2 <<<"$found")
  if [[ $(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1) != "$wanted" ]]; then
    die "Rust $found is too old; $wanted or newer is needed" "rustup update stable"
  fi
}

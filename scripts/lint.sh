#!/usr/bin/env bash
# Formats and lints of everything: Rust, shell, Python, dependencies.
#   scripts/lint.sh [--fix]     --fix changes what can be changed by a machine
here=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=scripts/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
source "$here/lib/packages.sh"
# shellcheck source=scripts/lib/python.sh
source "$here/lib/python.sh"
help_asked "$@"

rust_format() {
  if [[ -n $fix ]]; then cargo_run fmt --all; else cargo_run fmt --all --check; fi
}

rust_lints() {
  if [[ -n $fix ]]; then cargo_run clippy --locked --workspace --all-targets --fix --allow-dirty --allow-staged; fi
  cargo_run clippy --locked --workspace --all-targets -- -D warnings
}

# Every tracked or new file that a shell runs.
shell_files() {
  git -C "$repo" ls-files --cached --others --exclude-standard -- scripts .ci utils ci .buildkite packaging |
    while IFS= read -r file; do
      if [[ -f $repo/$file ]] && head -n 1 "$repo/$file" | grep -Eq '^#!.*\b(bash|sh)\b|^# shellcheck shell='; then echo "$file"; fi
    done
}

shell_lints() {
  local file files
  cd "$repo"
  # Of its own, so that what git fails at is not taken for a tree without scripts.
  files=$(shell_files)
  [[ -n $files ]] || die "git names no script in $repo" "git -C $repo status"
  for file in $files; do
    if [[ $file == scripts/lib/*.sh && $file != scripts/lib/rootfs-finish.sh ]]; then
      # A library's variables are set or used by those who source it.
      shellcheck -e SC2034,SC2154 "$file"
    else
      shellcheck -x -P SCRIPTDIR -P "$repo" "$file"
    fi
  done
}

python_lints() {
  local path
  local -a paths=(scripts tests utils utils/devvm packaging packaging/test-in-vm)
  cd "$repo"
  for path in ci ci/inner-vm ci/run-local; do
    if [[ -e $path ]]; then paths+=("$path"); fi
  done
  if [[ -n $fix ]]; then
    "$python_tools/bin/ruff" check --no-cache --fix "${paths[@]}"
    "$python_tools/bin/ruff" format --no-cache "${paths[@]}"
  else
    "$python_tools/bin/ruff" check --no-cache "${paths[@]}"
    "$python_tools/bin/ruff" format --no-cache --check "${paths[@]}"
  fi
}

# The fuzz targets are a workspace of their own. They are checked with the versions that ours is locked to, and without
# libFuzzer: that is C++, and only needed to run them. The path need not lead anywhere.
fuzz_lints() {
  as_builder cp -- "$repo/Cargo.lock" "$repo/fuzz/Cargo.lock"
  CUSTOM_LIBFUZZER_PATH=$target/no-libfuzzer.a CARGO_TARGET_DIR=$target \
    cargo_run clippy --manifest-path "$repo/fuzz/Cargo.toml" --bins -- -D warnings
}

dependency_lints() { cargo_run deny --manifest-path "$repo/Cargo.toml" --offline check licenses bans sources; }

failed=()
# Each lint is run, also after another has failed.
lint() {
  local status=0
  set +e
  (
    set -e
    step "$@"
  )
  status=$?
  set -e
  if ((status != 0)); then failed+=("$1"); fi
}

fix=""
case ${1:-} in
  "") ;;
  --fix) fix=yes ;;
  *) die "unknown argument: $1" "scripts/lint.sh [--fix]" ;;
esac
cd "$repo"
need_packages "${build_needs[@]}" "${lint_needs[@]}"
need_rust
need_python_tools
lint "cargo fmt" rust_format
lint "shellcheck" shell_lints
lint "ruff" python_lints
lint "cargo clippy" rust_lints
lint "fuzz targets" fuzz_lints
if cargo_run deny --version >/dev/null 2>&1; then
  lint "cargo deny" dependency_lints
else
  say "  cargo deny not run: it is not installed (cargo install cargo-deny)"
fi
((${#failed[@]} == 0)) || die "lint: ${failed[*]}" "scripts/lint.sh --fix mends what a machine can"
say "✓ lint"

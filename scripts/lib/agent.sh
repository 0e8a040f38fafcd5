# shellcheck shell=bash
# The guest agent as one static binary. Sourced after common.sh.

# musl where rustup has it, else glibc linked statically: both give a binary that needs nothing of its root.
agent_target() {
  local sysroot
  sysroot=$(as_builder rustc --print sysroot)
  if [[ -d $sysroot/lib/rustlib/x86_64-unknown-linux-musl ]]; then
    echo x86_64-unknown-linux-musl
  else
    echo x86_64-unknown-linux-gnu
  fi
}

# build_agent TRIPLE. --target is always given, or the flag would reach build scripts and procedural macros.
build_agent() {
  local flags=${RUSTFLAGS:-}
  if [[ $1 == *-gnu ]]; then flags="$flags -C target-feature=+crt-static"; fi
  RUSTFLAGS=$flags \
    cargo_run build --locked --manifest-path "$repo/Cargo.toml" --profile agent -p clawpot-agent --target "$1"
  printf 'note: %s KiB, %s\n' "$(($(stat -c %s "$(agent_binary "$1")") >> 10))" "${1##*-}"
}

agent_binary() { echo "$target/$1/agent/clawpot-agent"; }

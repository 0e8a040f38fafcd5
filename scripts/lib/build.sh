# shellcheck shell=bash
# Builds what runs on the host, and prepares what VMs boot. Sourced after common.sh, packages.sh.

# The dev profile: half the build time of release, and no VM's speed depends on it.
programs=(-p clawpot-server -p clawpot-cli -p clawpot-edge -p clawpot-image)
bin_dir=$target/debug

build_programs() { cargo_run build --locked --manifest-path "$repo/Cargo.toml" "${programs[@]}"; }

# A server that can be made to die at named points, for the tests of just that: $bin_dir/failpoints/clawpot-server. Of the same
# packages as the other, so that nothing foreign is compiled again; the other, which cargo has kept, is put back in its place.
build_mortal() {
  cargo_run build --locked --manifest-path "$repo/Cargo.toml" "${programs[@]}" --features clawpot-server/failpoints
  install -D -m 755 "$bin_dir/clawpot-server" "$bin_dir/failpoints/clawpot-server"
  build_programs
}

# A client of the builder's protocol made of the published crate `mvm-guest`: $bin_dir/clawpot-mvm-client. That crate's
# dependencies are in a workspace and a target directory of their own. Only tests need it.
build_mvm_client() {
  cargo_run build --locked --target-dir "$target/mvm-client" --manifest-path "$repo/tests/mvm-client/Cargo.toml"
  install -D -m 755 "$target/mvm-client/debug/clawpot-mvm-client" "$bin_dir/clawpot-mvm-client"
}

# That and the builder's image: what the builder's tests need besides.
prepare_builder_tests() {
  build_mvm_client
  "$repo/scripts/setup-builder.sh"
}

# Packages, programs, kernel, initramfs and the debian image; only what is not there yet.
prepare_host() {
  need_packages "${build_needs[@]}" "${image_needs[@]}" "${run_needs[@]}"
  need_rust
  step "building server and command line" build_programs
  "$repo/scripts/install-vm-assets.sh"
  "$repo/scripts/setup-rootfs.sh" debian
}

# The firecracker that install-vm-assets.sh could fetch, or nothing.
fetched_firecracker() {
  local found
  for found in "$assets"/firecracker/*/firecracker; do
    if [[ -x $found ]]; then printf '%s' "$found"; fi
  done
}

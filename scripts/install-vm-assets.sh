#!/usr/bin/env bash
# Prepares what every VM boots: the kernel (Debian's cloud kernel) and the initramfs (agent + its modules), in the image
# store; and Firecracker's release where it can be used. Does only what is not done yet.
#
#   scripts/install-vm-assets.sh [--upgrade] [--agent FILE]
#     --upgrade     take the newest kernel although there is one
#     --agent FILE  a static agent built elsewhere, instead of building it
# CLAWPOT_IMAGE_DIR names another store than assets/.
here=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=scripts/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
source "$here/lib/packages.sh"
# shellcheck source=scripts/lib/agent.sh
source "$here/lib/agent.sh"

# The metapackage whose dependency is the newest cloud kernel of the machine's own release.
kernel_metapackage=linux-image-cloud-amd64
firecracker_version=v1.15.1
# As seen alike in three independent projects that pin it.
firecracker_sha256=d4a32ab2322d887ca1bc4a4e7afa9cc35393e6362dfc2b3becb389d362e4275a
firecracker_url=https://github.com/firecracker-microvm/firecracker/releases/download/$firecracker_version/firecracker-$firecracker_version-x86_64.tgz

store() { as_root /usr/bin/python3 "$repo/scripts/lib/imagestore.py" "$assets" "$@"; }

# The package that the metapackage stands for: linux-image-6.1.0-NN-cloud-amd64.
kernel_package() {
  apt-cache depends --no-recommends --no-suggests "$kernel_metapackage" | awk '/Depends: linux-image-/ { print $2; exit }'
}

# fetch_kernel DIR: the newest kernel package, unpacked to DIR/tree; its checksum is verified by apt against signed lists.
fetch_kernel() {
  local dir=$1 package
  package=$(kernel_package || true)
  if [[ -z $package ]]; then
    apt_update
    package=$(kernel_package)
  fi
  [[ -n $package ]] || die "apt knows no $kernel_metapackage" "add Debian's main and security suites to the apt sources"
  cd "$dir"
  # root downloads without apt's sandbox user, who may not enter the directory.
  if ! as_root apt-get -q -o APT::Sandbox::User=root download "$package"; then
    apt_update
    package=$(kernel_package)
    as_root apt-get -q -o APT::Sandbox::User=root download "$package"
  fi
  as_root dpkg-deb -x "$package"_*.deb tree
  dpkg-deb -f "$package"_*.deb Version | as_root tee version >/dev/null
  echo "note: $package $(cat version)"
}

# unpack_kernel DIR: DIR/vmlinux, and the modules kept in the cache for later initramfs builds.
unpack_kernel() {
  local dir=$1 version kept
  version=$(cat "$dir/version")
  kept=$assets/cache/modules-$version
  as_root /usr/bin/python3 "$repo/scripts/lib/kernel.py" "$(echo "$dir"/tree/boot/vmlinuz-*)" "$dir/vmlinux"
  as_root rm -rf -- "$kept.half"
  as_root /usr/bin/python3 "$repo/scripts/lib/initramfs.py" --modules "$(modules_of "$dir/tree")" --keep "$kept.half"
  as_root rm -rf -- "$kept"
  as_root mv -T -- "$kept.half" "$kept"
}

# lib/modules or, where /usr is merged in packages too, usr/lib/modules.
modules_of() { find "$1" -maxdepth 4 -type d -path '*lib/modules/*' | head -n 1; }

# write_assets SCRATCH KERNEL_VERSION AGENT [vmlinux]
write_assets() {
  local scratch=$1 version=$2 agent=$3 agent_version
  local -a kernel=()
  agent_version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' "$repo/Cargo.toml")
  as_root /usr/bin/python3 "$repo/scripts/lib/initramfs.py" \
    --agent "$agent" --modules "$assets/cache/modules-$version" --out "$scratch/initramfs"
  if (($# > 3)); then kernel=(--kernel "$4" --kernel-version "$version"); fi
  store boot "${kernel[@]}" --initramfs "$scratch/initramfs" --agent-version "$agent_version"
}

fetch_firecracker() {
  local scratch=$1 dir=$2
  as_root rm -rf -- "$scratch/firecracker"
  /usr/bin/python3 - "$firecracker_url" "$firecracker_sha256" <<'PY' | as_root tee "$scratch/firecracker.tgz" >/dev/null
import hashlib, sys, urllib.request
data = urllib.request.urlopen(sys.argv[1], timeout=20).read()
found = hashlib.sha256(data).hexdigest()
if found != sys.argv[2]:
    sys.exit(f"the archive's SHA-256 is {found}, not {sys.argv[2]}: refused")
sys.stdout.buffer.write(data)
PY
  as_root mkdir -p -- "$scratch/firecracker"
  as_root tar -xzf "$scratch/firecracker.tgz" -C "$scratch/firecracker" --strip-components=1 --no-same-owner
  as_root mv -- "$scratch/firecracker/firecracker-$firecracker_version-x86_64" "$scratch/firecracker/firecracker"
  as_root mv -- "$scratch/firecracker/jailer-$firecracker_version-x86_64" "$scratch/firecracker/jailer"
  as_root mkdir -p -- "$(dirname -- "$dir")"
  as_root mv -T -- "$scratch/firecracker" "$dir"
}

# Firecracker is a gain, not a need: without it QEMU runs the VMs. So a failure is told, not raised.
offer_firecracker() {
  local scratch=$1 dir=$assets/firecracker/$firecracker_version refused=$assets/cache/firecracker-not-had why log
  if [[ -x $dir/firecracker ]]; then return; fi
  if [[ ! -e /dev/kvm ]]; then
    say "  Firecracker not fetched: no /dev/kvm here; VMs run in QEMU"
    return
  fi
  # Asked again after a day.
  if [[ -n $(find "$refused" -mmin -1440 2>/dev/null) ]]; then
    say "  Firecracker not fetched: $(cat "$refused"); VMs run in QEMU"
    return
  fi
  log=$(mktemp -t clawpot-firecracker.XXXXXX)
  set +e
  (
    set -e
    fetch_firecracker "$scratch" "$dir"
  ) >"$log" 2>&1
  set -e
  if [[ -x $dir/firecracker ]]; then
    say "✓ Firecracker $firecracker_version fetched, SHA-256 verified"
  else
    why=$(last_line "$log")
    why=${why#urllib.error.*: }
    say "  Firecracker not fetched: ${why:-download failed}; VMs run in QEMU"
    printf '%s\n' "${why:-download failed} (last tried $(date -u +%FT%RZ))" | as_root tee "$refused" >/dev/null
  fi
  rm -f -- "$log"
}

main() {
  local upgrade="" agent="" triple version scratch
  while (($# > 0)); do
    case $1 in
      --upgrade) upgrade=yes ;;
      --agent)
        agent=${2:?--agent needs a file}
        shift
        ;;
      -h | --help)
        sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      *) die "unknown argument: $1" "see --help" ;;
    esac
    shift
  done
  [[ $(uname -m) == x86_64 ]] || die "only x86_64 hosts are supported so far, this is $(uname -m)"

  need_packages "${build_needs[@]}" "${image_needs[@]}"
  if [[ -z $agent ]]; then
    need_rust
    triple=$(agent_target)
    step "building the guest agent" build_agent "$triple"
    agent=$(agent_binary "$triple")
  fi

  store init
  exec 9<"$assets/cache/lock"
  flock 9
  # Half-made things bear names in here until they are whole; on the store's file system, so that moving is renaming.
  scratch=$(as_root mktemp -d "$assets/cache/.scratch.XXXXXX")
  as_root chmod 755 "$scratch"
  # shellcheck disable=SC2064 # this very directory, expanded now
  trap "abandon_step; as_root rm -rf -- '$scratch'" EXIT

  version=$(store has-kernel || true)
  if [[ -n $version && -z $upgrade && -d $assets/cache/modules-$version ]]; then
    step "initramfs for kernel $version" write_assets "$scratch" "$version" "$agent"
  else
    step "fetching the kernel ($kernel_metapackage)" fetch_kernel "$scratch"
    version=$(cat "$scratch/version")
    step "unpacking kernel $version" unpack_kernel "$scratch"
    step "initramfs for kernel $version" write_assets "$scratch" "$version" "$agent" "$scratch/vmlinux"
  fi
  offer_firecracker "$scratch"
}

main "$@"

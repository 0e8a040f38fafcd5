#!/usr/bin/env bash
# Prepares what every VM boots: the kernel and the initramfs (agent + its modules), in the image store; and Firecracker's
# release where it can be used. Does only what is not done yet; a download that was interrupted goes on where it was.
#
#   scripts/install-vm-assets.sh [--upgrade] [--agent FILE] [--kernel debian|ci] [--firecracker auto|always|never]
#     --upgrade      take the newest kernel although there is one
#     --agent FILE   a static agent built elsewhere, instead of building it
#     --kernel WHICH debian: Debian's cloud kernel, from the machine's apt, the default; ci: the kernel of Firecracker's own
#                    CI, by its digest, for Firecracker alone. Not given: the one that is there
#     --firecracker  auto: fetched where /dev/kvm exists, and its lack is no failure, the default; always: its lack is one
# CLAWPOT_IMAGE_DIR names another store than assets/. FIRECRACKER_URL with FIRECRACKER_SHA256, and CI_KERNEL_URL with
# CI_KERNEL_SHA256, name a mirror or another release. To use it without a network put the files, by hand and named as at the
# end of their URLs, into the store's cache/downloads: their digests are checked in the same way.
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
# Both digests as seen alike in three independent projects that pin them.
firecracker_url=https://github.com/firecracker-microvm/firecracker/releases/download/$firecracker_version/firecracker-$firecracker_version-x86_64.tgz
firecracker_sha256=d4a32ab2322d887ca1bc4a4e7afa9cc35393e6362dfc2b3becb389d362e4275a
ci_kernel_version=ci-6.1.155
ci_kernel_url=https://s3.amazonaws.com/spec.ccfc.min/firecracker-ci/v1.15/x86_64/vmlinux-6.1.155
ci_kernel_sha256=e20e46d0c36c55c0d1014eb20576171b3f3d922260d9f792017aeff53af3d4f2
if [[ -n ${FIRECRACKER_URL:-}${FIRECRACKER_SHA256:-} ]]; then
  firecracker_url=${FIRECRACKER_URL:?FIRECRACKER_SHA256 needs FIRECRACKER_URL}
  firecracker_sha256=${FIRECRACKER_SHA256:?FIRECRACKER_URL needs FIRECRACKER_SHA256}
  firecracker_version=$(grep -oE 'v[0-9]+\.[0-9]+\.[0-9]+' <<<"${firecracker_url##*/}" | head -n 1 || true)
  [[ -n $firecracker_version ]] || die "FIRECRACKER_URL=$firecracker_url names no version (vN.N.N)"
fi
if [[ -n ${CI_KERNEL_URL:-}${CI_KERNEL_SHA256:-} ]]; then
  ci_kernel_url=${CI_KERNEL_URL:?CI_KERNEL_SHA256 needs CI_KERNEL_URL}
  ci_kernel_sha256=${CI_KERNEL_SHA256:?CI_KERNEL_URL needs CI_KERNEL_SHA256}
  ci_kernel_version=ci-${ci_kernel_url##*/vmlinux-}
fi

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
  local -a with_kernel=()
  agent_version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' "$repo/Cargo.toml")
  as_root /usr/bin/python3 "$repo/scripts/lib/initramfs.py" \
    --agent "$agent" --modules "$assets/cache/modules-$version" --out "$scratch/initramfs"
  if (($# > 3)); then with_kernel=(--kernel "$4" --kernel-version "$version"); fi
  store boot "${with_kernel[@]}" --initramfs "$scratch/initramfs" --agent-version "$agent_version"
}

# download URL SHA256: into the cache, where a half one is found again by the next run.
download() {
  local url=$1 sha256=$2 name
  local -a proxies=()
  # sudo would drop them.
  for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY SSL_CERT_FILE; do
    if [[ -n ${!name:-} ]]; then proxies+=("$name=${!name}"); fi
  done
  as_root mkdir -p -- "$assets/cache/downloads"
  as_root env "${proxies[@]}" /usr/bin/python3 "$repo/scripts/lib/fetch.py" "$url" "$sha256" "$assets/cache/downloads/${url##*/}"
}

# fetch_ci_kernel DIR: what fetch_kernel and unpack_kernel do, with a kernel that has everything built in.
fetch_ci_kernel() {
  local dir=$1 kept=$assets/cache/modules-$ci_kernel_version file=$assets/cache/downloads/${ci_kernel_url##*/}
  download "$ci_kernel_url" "$ci_kernel_sha256"
  as_root /usr/bin/python3 "$repo/scripts/lib/kernel.py" "$file" "$dir/vmlinux"
  as_root rm -rf -- "$kept"
  as_root mkdir -- "$kept"
  as_root /usr/bin/python3 "$repo/scripts/lib/initramfs.py" --modules "$kept" --all-built-in
  as_root rm -f -- "$file"
}

fetch_firecracker() {
  local scratch=$1 dir=$2 file=$assets/cache/downloads/${firecracker_url##*/} name
  download "$firecracker_url" "$firecracker_sha256"
  as_root rm -rf -- "$scratch/firecracker"
  as_root mkdir -p -- "$scratch/firecracker"
  as_root tar -xzf "$file" -C "$scratch/firecracker" --strip-components=1 --no-same-owner
  for name in firecracker jailer; do
    as_root mv -- "$scratch/firecracker/$name-$firecracker_version-x86_64" "$scratch/firecracker/$name"
    [[ $("$scratch/firecracker/$name" --version) == *"${firecracker_version#v}"* ]] || die "$name does not say that it is $firecracker_version"
  done
  as_root mkdir -p -- "$(dirname -- "$dir")"
  as_root rm -rf -- "$dir"
  as_root mv -T -- "$scratch/firecracker" "$dir"
  as_root rm -f -- "$file"
}

# Firecracker is a gain, not a need, unless it was asked for: without it QEMU runs the VMs. So a failure is told, not raised.
offer_firecracker() {
  local scratch=$1 how=$2 dir=$assets/firecracker/$firecracker_version refused=$assets/cache/firecracker-not-had why log
  if [[ $how == never ]] || [[ -x $dir/firecracker && -x $dir/jailer ]]; then return; fi
  if [[ $how == always ]]; then
    step "fetching Firecracker $firecracker_version" fetch_firecracker "$scratch" "$dir"
    return
  fi
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
    say "  Firecracker not fetched: ${why:-download failed}; VMs run in QEMU"
    printf '%s\n' "${why:-download failed} (last tried $(date -u +%FT%RZ))" | as_root tee "$refused" >/dev/null
  fi
  rm -f -- "$log"
}

# make_boot SCRATCH KERNEL UPGRADE AGENT: a kernel when there is none or another is wanted, and always the initramfs.
make_boot() {
  local scratch=$1 kernel=$2 upgrade=$3 agent=$4 version
  version=$(store has-kernel || true)
  if [[ ! -d $assets/cache/modules-$version ]]; then version=""; fi
  case $kernel in
    ci) if [[ $version != "$ci_kernel_version" ]]; then version=""; fi ;;
    debian) if [[ $version == ci-* ]]; then version=""; fi ;;
  esac
  if [[ -n $version && -z $upgrade ]]; then
    step "initramfs for kernel $version" write_assets "$scratch" "$version" "$agent"
    return
  fi
  if [[ $kernel == ci ]]; then
    step "fetching the kernel ($ci_kernel_version)" fetch_ci_kernel "$scratch"
    version=$ci_kernel_version
  else
    step "fetching the kernel ($kernel_metapackage)" fetch_kernel "$scratch"
    version=$(cat "$scratch/version")
    step "unpacking kernel $version" unpack_kernel "$scratch"
  fi
  step "initramfs for kernel $version" write_assets "$scratch" "$version" "$agent" "$scratch/vmlinux"
}

main() {
  local upgrade="" agent="" kernel="" firecracker=auto triple scratch
  while (($# > 0)); do
    case $1 in
      --upgrade) upgrade=yes ;;
      --agent)
        agent=${2:?--agent needs a file}
        shift
        ;;
      --kernel)
        kernel=${2:?--kernel needs debian or ci}
        [[ $kernel == debian || $kernel == ci ]] || die "--kernel $kernel: debian or ci"
        shift
        ;;
      --firecracker)
        firecracker=${2:?--firecracker needs auto, always or never}
        [[ $firecracker == auto || $firecracker == always || $firecracker == never ]] ||
          die "--firecracker $firecracker: auto, always or never"
        shift
        ;;
      -h | --help)
        sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      *) die "unknown argument: $1" "see --help" ;;
    esac
    shift
  done
  [[ $(uname -m) == x86_64 ]] || die "only x86_64 hosts are supported so far, this is $(uname -m)"

  need_packages "${image_needs[@]}"
  if [[ -z $agent ]]; then
    need_packages "${build_needs[@]}"
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

  make_boot "$scratch" "$kernel" "$upgrade" "$agent"
  offer_firecracker "$scratch" "$firecracker"
}

main "$@"

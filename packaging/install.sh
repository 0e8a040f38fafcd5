#!/usr/bin/env bash
# Installs Clawpot on this host, or takes it away again; what `make install` and `make uninstall` run.
#
#   packaging/install.sh install|uninstall [--enable]
#     --enable   start the server now and at every boot
# PREFIX (default /usr/local) and DESTDIR as ever: with DESTDIR files are laid there and nothing of this host is changed.
# STATE_DIR (default /var/lib/clawpot) is filled in the unit. BIN_DIR names other binaries than target/release.
#
# For an ordinary user one part is run by sudo, once: `place` or `remove`. What is built and gathered is the user's.
here=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=scripts/lib/common.sh
source "$here/../scripts/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
source "$here/../scripts/lib/packages.sh"

prefix=${PREFIX:-/usr/local}
destdir=${DESTDIR:-}
state=${STATE_DIR:-/var/lib/clawpot}
bin_dir=${BIN_DIR:-$target/release}
sysctl_file=/etc/sysctl.d/60-clawpot.conf
unit=$prefix/lib/systemd/system/clawpot.service
# systemd looks for units and their kin in /etc, /run, /usr/local/lib and /usr/lib.
case $prefix in
  /usr | /usr/local) kin=$prefix/lib ;;
  *) kin=/etc unit=/etc/systemd/system/clawpot.service ;;
esac

binaries=("$prefix/bin/clawpot" "$prefix/sbin/clawpot-server" "$prefix/sbin/clawpot-edge" "$prefix/sbin/clawpot-unpack")
configuration=("$unit" "$kin/sysusers.d/clawpot.conf" "$kin/tmpfiles.d/clawpot.conf" "$sysctl_file")
completions=("$prefix/share/bash-completion/completions/clawpot" "$prefix/share/zsh/site-functions/_clawpot"
  "$prefix/share/fish/vendor_completions.d/clawpot.fish")
manuals=$prefix/share/man

# put MODE FILE PLACE: into the tree of what is to be installed.
put() { install -D -m "$1" -- "$2" "$scratch/tree$3"; }

# elevated VERB…: this script again, as root.
elevated() {
  as_root env PREFIX="$prefix" DESTDIR="$destdir" STATE_DIR="$state" "$repo/packaging/install.sh" "$@"
}

# fill FILE: with what only the installation knows.
fill() { sed -e "s|@SBIN@|$prefix/sbin|g" -e "s|@STATE@|$state|g" -- "$1"; }

build_release() { cargo_run build --locked --release --manifest-path "$repo/Cargo.toml" \
  -p clawpot-server -p clawpot-cli -p clawpot-edge -p clawpot-image; }

gather() {
  local shell page
  put 755 "$bin_dir/clawpot" "${binaries[0]}"
  put 755 "$bin_dir/clawpot-server" "${binaries[1]}"
  put 755 "$bin_dir/clawpot-edge" "${binaries[2]}"
  put 755 "$bin_dir/clawpot-unpack" "${binaries[3]}"

  fill "$here/systemd/clawpot.service.in" >"$scratch/unit"
  put 644 "$scratch/unit" "${configuration[0]}"
  put 644 "$here/sysusers.conf" "${configuration[1]}"
  fill "$here/tmpfiles.conf.in" >"$scratch/tmpfiles"
  put 644 "$scratch/tmpfiles" "${configuration[2]}"
  sysctl_with_memory >"$scratch/sysctl"
  put 644 "$scratch/sysctl" "${configuration[3]}"

  for shell in bash zsh fish; do "$bin_dir/clawpot" completions "$shell" >"$scratch/$shell"; done
  put 644 "$scratch/bash" "${completions[0]}"
  put 644 "$scratch/zsh" "${completions[1]}"
  put 644 "$scratch/fish" "${completions[2]}"
  mkdir -- "$scratch/man"
  "$bin_dir/clawpot" man "$scratch/man"
  for page in "$scratch"/man/*.1; do put 644 "$page" "$manuals/man1/${page##*/}"; done
  "$bin_dir/clawpot-server" man >"$scratch/clawpot-server.8"
  put 644 "$scratch/clawpot-server.8" "$manuals/man8/clawpot-server.8"
}

# The file's settings, and in comments what each was before ours: an earlier installation's memory is kept.
sysctl_with_memory() {
  local key
  cat -- "$here/sysctl.conf"
  if [[ -n $destdir ]]; then return; fi
  for key in $(sysctl_keys "$here/sysctl.conf"); do
    grep -s "^# before: $key = " "$sysctl_file" || echo "# before: $key = $(cat "/proc/sys/${key//.//}")"
  done
}

sysctl_keys() { sed -n 's/^\([a-z0-9_.]*\) *=.*/\1/p' -- "$1"; }

set_sysctl() { printf '%s\n' "$2" >"/proc/sys/${1//.//}"; }

with_systemd() { [[ -d /run/systemd/system ]]; }

activate() {
  if command -v systemd-sysusers >/dev/null; then systemd-sysusers clawpot.conf; else groupadd --system --force clawpot; fi
  if command -v systemd-tmpfiles >/dev/null; then systemd-tmpfiles --create clawpot.conf; fi
  local line
  while IFS= read -r line; do
    set_sysctl "${line%% =*}" "${line#*= }"
  done < <(grep -E '^[a-z0-9_.]+ *=' "$sysctl_file")
  if with_systemd; then systemctl daemon-reload; fi
}

# What still runs would have nobody left who could end it.
refuse_while_vms_run() {
  local found
  found=$(find /sys/fs/cgroup -path '*/clawpot/*/cgroup.events' ! -path '*/resolver/*' -exec grep -l '^populated 1' {} + 2>/dev/null |
    grep -E '/[a-z0-9]{16}-[0-9]+/cgroup.events$' || true)
  if [[ -n $found ]]; then
    die "$(wc -l <<<"$found") VM(s) still run" "remove them first: clawpot ls, clawpot rm; or keep the server"
  fi
}

deactivate() {
  if with_systemd && [[ -e $unit ]]; then systemctl disable --now --quiet clawpot.service; fi
}

# A server that ends leaves stopped VMs their resolver and addresses, which a program that is gone could not take away.
clear_host() {
  local server=${binaries[1]}
  if [[ ! -x $server ]]; then return; fi
  # With the settings that the unit has.
  "$server" clear-host ||
    die "what the server left on this host could not be taken away; nothing was removed" "see the lines above, then uninstall again"
}

# put_back FILE: settings that are still as we made them become what they were.
put_back() {
  local key value before
  [[ -e $1 ]] || return 0
  while IFS=' ' read -r key before; do
    value=$(sed -n "s/^$key *= *//p" "$1")
    if [[ $(cat "/proc/sys/${key//.//}") == "$value" && $value != "$before" ]]; then
      set_sysctl "$key" "$before"
      say "  $key is $before again"
    fi
  done < <(sed -n 's/^# before: \([a-z0-9_.]*\) = \(.*\)/\1 \2/p' "$1")
}

remove_files() {
  local file
  for file in "${binaries[@]}" "${configuration[@]}" "${completions[@]}" "$manuals"/man1/clawpot{,-*}.1 "$manuals/man8/clawpot-server.8"; do
    rm -f -- "$destdir$file" "$(half "$destdir$file")"
  done
  # The names of pages are this version's; those of an older one go too.
  find "$destdir$manuals/man1" -maxdepth 1 -name 'clawpot-*.1' -delete 2>/dev/null || true
}

build_and_gather() {
  if [[ -z ${BIN_DIR:-} ]]; then
    need_packages "${build_needs[@]}"
    need_rust
    step "building server, command line and resolver (release)" build_release
  fi
  scratch=$(mktemp -d -t clawpot-install.XXXXXX)
  # shellcheck disable=SC2064 # this very directory, expanded now
  trap "abandon_step; rm -rf -- '$scratch'" EXIT
  gather
}

# half FILE: what it is called until it is whole. Nobody reads units, settings or pages of such a name.
half() { printf '%s/.%s.new' "${1%/*}" "${1##*/}"; }

# lay TREE: its files, all beside their places and then each in its place at once. So a server that is started meanwhile finds the old
# program or the new one, and what fails (a full disk) leaves the old version as it was.
lay() {
  local tree=$1 mode file halves=() files=()
  while read -r mode file; do
    files+=("$destdir/$file") halves+=("$(half "$destdir/$file")")
    if ! install -D -m "$mode" -o root -g root -- "$tree/$file" "${halves[-1]}"; then
      rm -f -- "${halves[@]}" || true
      die "$destdir/$file could not be written; nothing was replaced" "see the line above, then install again"
    fi
  done < <(cd -- "$tree" && find . -type f -printf '%m %P\n')
  sync -- "${halves[@]}"
  for file in "${files[@]}"; do mv -fT -- "$(half "$file")" "$file"; done
}

# place TREE [--enable]: its files, and what they need of this host. The directories that are there stay as they are.
place() {
  lay "$1"
  if [[ -n $destdir ]]; then return; fi
  need_packages "${run_needs[@]}"
  activate
  if [[ -n ${2:-} ]]; then systemctl enable --now clawpot.service; fi
}

tell_installed() {
  say "✓ installed in $prefix"
  if with_systemd && systemctl --quiet is-active clawpot.service; then
    say "  the old server still runs: sudo systemctl restart clawpot (VMs run on)"
  fi
  say "  images:  sudo CLAWPOT_IMAGE_DIR=$state/images scripts/install-vm-assets.sh; the same with scripts/setup-rootfs.sh debian"
  say "  start:   sudo systemctl enable --now clawpot"
  say "  callers: sudo adduser NAME clawpot (as good as root, see SECURITY.md)"
}

remove() {
  if [[ -n $destdir ]]; then
    remove_files
    return
  fi
  refuse_while_vms_run
  deactivate
  clear_host
  put_back "$sysctl_file"
  remove_files
  if with_systemd; then systemctl daemon-reload; fi
  say "✓ uninstalled; records, disks and images stay in $state, and the group clawpot stays"
}

main() {
  local verb=${1:-} scratch=""
  case $verb in
    install)
      if [[ ${2:---enable} != --enable ]]; then die "unknown argument: $2" "see --help"; fi
      build_and_gather
      elevated place "$scratch/tree" "${@:2}"
      if [[ -z $destdir ]]; then tell_installed; fi
      ;;
    uninstall) elevated remove ;;
    place) place "${@:2}" ;;
    remove) remove ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
    *) die "install or uninstall?" "packaging/install.sh --help" ;;
  esac
}

main "$@"

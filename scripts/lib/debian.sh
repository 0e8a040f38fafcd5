# shellcheck shell=bash
# What this machine's own apt configuration says of Debian and of the way to it. Sourced after common.sh.

# shellcheck source=/dev/null
codename() { (. /etc/os-release && printf '%s' "${VERSION_CODENAME:?this Debian has no codename}"); }

# This machine's Debian sources as one-line entries: those whose signed Release file says Origin: Debian and that belong to
# its own release. apt itself is asked, so lists, deb822 files and every option are read as apt reads them.
debian_sources() {
  local release=$1
  # shellcheck disable=SC2016 # apt's placeholders, not the shell's
  apt-get indextargets --format '$(ORIGIN) $(RELEASE) $(COMPONENT) $(ARCHITECTURE) $(REPO_URI)' 'Created-By: Packages' |
    awk -v release="$release" '
      $1 == "Debian" && $3 == "main" && $4 == "amd64" &&
      ($2 == release || $2 == release "-updates" || $2 == release "-security" || $2 == release "/updates") {
        print "deb " $5 " " $2 " main"
      }' | sort -u
}

# How this machine reaches its mirrors (proxies, certificates, patience), for the apt that fills the image.
transport_options() {
  apt-config dump --format '%f "%v";%n' Acquire |
    grep -E '^Acquire::((http|https)(::|$)|Retries |Check-Valid-Until |Check-Date |AllowInsecure|ForceIPv)' | grep -v ' "";$' || true
}

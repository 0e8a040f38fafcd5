# shellcheck shell=bash
# uv and ruff, from the machine's own package index into a private environment. Sourced after common.sh, packages.sh.

python_tools=$target/python-tools
python_tools_wanted='uv>=0.9,<1 ruff>=0.14,<0.15'

install_python_tools() {
  as_builder rm -rf -- "$python_tools"
  as_builder mkdir -p -- "$target"
  as_builder /usr/bin/python3 -m venv "$python_tools"
  # shellcheck disable=SC2086 # a list of words
  as_builder "$python_tools/bin/pip" install --quiet --disable-pip-version-check $python_tools_wanted
  as_builder tee "$python_tools/wanted" >/dev/null <<<"$python_tools_wanted"
}

need_python_tools() {
  if [[ $(cat "$python_tools/wanted" 2>/dev/null) == "$python_tools_wanted" ]]; then return; fi
  need_packages "${python_needs[@]}"
  step "installing uv and ruff" install_python_tools
}

# uv as the tests need it: the system's Python and certificates, the index that pip is configured for, nothing in the tree.
uv_run() {
  local index
  index=$("$python_tools/bin/pip" config get global.index-url 2>/dev/null || true)
  if [[ -n ${PIP_INDEX_URL:-$index} ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$index}}; fi
  export SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
  export UV_PYTHON=/usr/bin/python3 UV_PYTHON_DOWNLOADS=never UV_CACHE_DIR=$target/uv-cache
  export UV_PROJECT_ENVIRONMENT=$target/integration-venv
  as_root_keeping_environment "$python_tools/bin/uv" run --quiet --project "$repo/tests/integration" "$@"
}

as_root_keeping_environment() {
  if ((EUID == 0)); then "$@"; else sudo -E -- env PATH="$PATH" "$@"; fi
}

#!/usr/bin/env bash
# Installs what the tests start and is not there: servers, and a browser. Only root may, where
# there is apt-get; for others it says what is missing, and the tests of those are skipped.
set -euo pipefail
# servers are in folders that only root has in its PATH
PATH="$PATH:/usr/local/sbin:/usr/sbin"

has() { command -v "$1" >/dev/null; }

# what Debian has in the PATH changes the user first; the server itself is beside it
has_rabbitmq() { [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || has rabbitmq-server; }

has_browser() { has chromium || has chromium-browser || has google-chrome; }

wanted=()
has mariadbd || wanted+=(mariadb-server)
has redis-server || wanted+=(redis-server)
has_rabbitmq || wanted+=(rabbitmq-server)
has setpriv || wanted+=(util-linux)
has_browser || wanted+=(chromium)

[ ${#wanted[@]} -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! has apt-get; then
    echo "Not installed, by Debian's names: ${wanted[*]}. Tests that need them are skipped," >&2
    echo "or fail where CI is true. On Debian and Ubuntu: apt install ${wanted[*]}" >&2
    exit 0
fi

echo "Installing what the tests start: ${wanted[*]}"
export DEBIAN_FRONTEND=noninteractive
# the tests start servers of their own; should a package fail to start its one, it is taken
# not to be installed
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null

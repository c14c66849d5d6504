#!/bin/sh
# Makes in /credentials what the profiles tls and gpu-tls need and is not there yet: certificates of an authority of this node's own, for
# the names in NAMES; and a file of tenants, with a key each for clients, who runs the fleet, and the health check. What is there stays.
set -eu
umask 077
cd /credentials

if ! [ -e router.pem ]; then
  set --
  for name in ${NAMES:-}; do set -- "$@" --host "$name"; done
  splitfire certs . "$@"
fi

new_tenant() { # its name, and what is in its table beside the key
  splitfire key >.new
  head -n 1 .new >"$1.key"
  printf '[tenant.%s]\n%s\n%s\n\n' "$1" "$(tail -n 1 .new)" "$2" >>.keys
  rm .new
}

if ! [ -e keys.toml ]; then
  rm -f .keys
  new_tenant clients 'class = "standard"'
  new_tenant admin 'admin = true'
  new_tenant health 'class = "interactive"'
  mv .keys keys.toml
  echo keys.toml
fi

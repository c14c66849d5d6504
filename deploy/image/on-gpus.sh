#!/bin/sh
# on-gpus.sh LIST ROLE [FLAG...]: a worker on the first GPUs of LIST (numbers or UUIDs with commas between them) that no other worker of
# that role has: one GPU, or as many as SPLITFIRE_TENSOR_PARALLEL says. So the replicas of a service share a list out among themselves.
# Who has them holds a lock on a file in /dev/shm, which the containers of a node share; it is gone with the process, however that ends.
set -eu
gpus=$1 size=${SPLITFIRE_TENSOR_PARALLEL:-1}
shift
for group in $(echo "$gpus" | tr ',' ' ' | xargs -n "${size:-1}" | tr ' ' ','); do
  [ "$(echo "$group" | tr ',' '\n' | wc -l)" -eq "${size:-1}" ] || continue
  exec 9>"/dev/shm/splitfire-$1-$group"
  if flock --nonblock 9; then
    export CUDA_VISIBLE_DEVICES="$group"
    exec splitfire "$@"
  fi
done
echo "splitfire: every ${size:-1} of the GPUs $gpus have a $1 worker already: name more of them, or start fewer workers" >&2
exit 2

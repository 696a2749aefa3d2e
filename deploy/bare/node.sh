#!/bin/bash
# One machine of a cluster without a cloud or Kubernetes. On the first machine, then on each of the others:
#   deploy/bare/node.sh head 10.0.0.1
#   deploy/bare/node.sh join 10.0.0.1
# Both stay in the foreground, as systemd wants it, and end Ray's processes of this machine when they are ended.
#
# Before: the same environment (make setup, or the image) on every machine, /shared mounted everywhere, and one token, the same on
# all of them: (umask 077; mkdir -p ~/.ray; openssl rand -hex 32 > ~/.ray/auth_token). The firewall lets the machines reach each
# other on all ports, Prometheus 8080, and nobody else any.
#
# Jobs: align submit on the first machine, or through ssh -L 8265:127.0.0.1:8265 10.0.0.1.
# ALIGN_RESOURCES: more for Ray to know of this machine, as JSON.
set -euo pipefail

role=${1:?head or join} head=${2:?address of the first machine}
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ ! -s "$token" ]; then
    echo "no token in $token: make one on the first machine and copy it to every other, readable by you alone" >&2
    exit 1
fi
if [ -n "$(find "$token" -perm /077)" ]; then
    echo "$token can be read by others: chmod 600 $token" >&2
    exit 1
fi
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token  # said, since Ray's default depends on whether a token file is there
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0  # else every actor yields to whatever else the machine does
# A machine that is gone is found within 24 s, not 66 s. Read by the head.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=4
ulimit -n "$(ulimit -Hn)"  # open files: as many as the machine lets us; 65536 is enough

more=(--metrics-export-port=8080 --resources="${ALIGN_RESOURCES:-{\}}" --block)
case $role in
    head) exec ray start --head --node-ip-address="$head" --port=6379 --dashboard-host=127.0.0.1 "${more[@]}" ;;
    join) exec ray start --address="$head:6379" "${more[@]}" ;;
    *) echo "head or join, not $role" >&2; exit 2 ;;
esac

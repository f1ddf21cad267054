#!/usr/bin/env bash
# What a token's check costs a gateway: the real binary beside a bare net/http handler
# that sends the same bytes, each on one core, loaded in turn over eight connections.
# of-bare is the share of the bare handler's throughput that is left: with 2,000 tokens
# in turn, with tokens that were never seen before, and with forged ones.
#
# It starts PostgreSQL and Keycloak by itself, and wants two cores that are idle.
set -euo pipefail
cd "$(dirname "$0")/.."
go test -run '^$' -bench 'Validate' -benchtime "${1:-40x}" .

#!/usr/bin/env bash
# What a token's check costs a gateway: the real binary beside two bare net/http handlers, one without headers and one
# with the same answer, and oauth2-proxy if the PATH has it; each on one core, loaded in turn over eight connections.
# of-bare is the share of the bare handler's throughput that is left, in the median of all rounds: with one token, with
# 2,000 in turn, with tokens that were never seen before, and with forged ones. Quartiles are printed beside it.
#
# It starts PostgreSQL and Keycloak by itself, and wants two cores that are idle.
set -euo pipefail
cd "$(dirname "$0")/.."
go test -run '^$' -bench 'Validate' -benchtime "${1:-60x}" .

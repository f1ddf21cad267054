#!/usr/bin/env bash
# The figures of docs/performance.md: size of the binary, time to the first answer with the
# schema current, memory when idle. Wants the dev stack: go run ./dev -no-service
set -euo pipefail
cd "$(dirname "$0")/.."
binary=$(mktemp) log=$(mktemp)
CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$binary" .
export DATABASE_URL=${DATABASE_URL:-postgres://postgres:password@127.0.0.1:6200/auth_db}
export KEYCLOAK_URL=${KEYCLOAK_URL:-http://localhost:5080} KEYCLOAK_REALM=myrealm KEYCLOAK_AUTH_CLIENT_ID=auth-client
export KEYCLOAK_BACKEND_CLIENT_ID=backend-admin KEYCLOAK_BACKEND_CLIENT_SECRET=dev-backend-secret
export SERVER_PORT=3999 MANAGEMENT_ADDR=127.0.0.1:9999
echo "binary: $(($(stat -c %s "$binary") / 1000000)) MB"
for _ in 1 2 3 4; do # the first applies the schema
  start=$(date +%s%N)
  "$binary" 2>"$log" & pid=$!
  until curl -sf localhost:3999/health -o "$log.out"; do :; done
  end=$(date +%s%N)
  echo "first answer after $(((end - start) / 1000000)) ms"
  curl -s --retry 3 --retry-connrefused localhost:9999/metrics | awk '/^process_resident_memory_bytes/ {printf "resident: %.0f MB\n", $2 / 1e6}'
  kill $pid
  wait $pid
done
rm -f "$binary" "$log" "$log.out"

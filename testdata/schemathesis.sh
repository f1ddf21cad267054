#!/usr/bin/env bash
# schemathesis.sh [SECONDS]: sends the service what its OpenAPI document allows and what it forbids, as an
# administrator, and looks for 5xx, answers that the document does not have, and what is accepted though it is invalid.
# It starts PostgreSQL and Keycloak by itself, and wants Python 3.10 or newer. What is not looked for, and why, is in
# testdata/schemathesis/schemathesis.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
python=dev/.run/schemathesis
[ -x $python/bin/schemathesis ] || {
	python3 -m venv $python
	$python/bin/pip install -q --require-hashes -r testdata/schemathesis/requirements.txt
}
export SCHEMATHESIS=$PWD/$python/bin/schemathesis
go test -count=1 -v -tags schemathesis -timeout 3h -run '^TestSchemathesis$' . -args -- --max-time "${1:-300}"

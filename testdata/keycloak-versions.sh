#!/usr/bin/env bash
# Runs the contract's tests against each version of Keycloak that is supported, one after the other. Each has a state
# of its own in dev/.run. Other versions, or tests, by arguments: testdata/keycloak-versions.sh "26.4.7" TestLogin
set -euo pipefail
cd "$(dirname "$0")/.."
versions=${1:-26.4.7 26.5.6 26.7.3}
tests=${2:-^Test(Register|Verify|Resend|Cancel|Expiry|Mails|Login|OneTimeCode|CodeFlow|Refresh|Logout|Sessions|AllMeansAll|ChangedCredential|ForgotPassword|Invitation|DeleteAndRestore|ChangeOfRole|Sync|Doctor|Adoption|OddIDs|UnknownKinds|TokensThat|ForgedTokens|PasswordPolicy)}
for version in $versions; do
	echo "Keycloak $version"
	start=$SECONDS
	KEYCLOAK_VERSION=$version go test -count=1 -short -timeout 40m -run "$tests" .
	echo "Keycloak $version: $((SECONDS - start)) s"
done

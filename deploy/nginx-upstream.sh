#!/bin/sh
# Keeps an upstream of nginx to the instances that are ready, which nginx itself does not ask for:
#
#     nginx-upstream.sh FILE SERVICE=MANAGEMENT...
#
# asks /readyz at each MANAGEMENT address, writes a line "server SERVICE ..." to FILE for each that is ready, and
# reloads nginx if they have changed; a second later again. nginx has "include FILE;" in the upstream. While no instance is
# ready FILE stays as it is. SHUTDOWN_DELAY must be longer than all of that takes.
set -eu
file=$1
shift
while :; do
	ready=$(for pair in "$@"; do
		! curl -fs --noproxy '*' -o /dev/null -m "${TIMEOUT:-2}" "http://${pair#*=}/readyz" ||
			echo "server ${pair%%=*} max_fails=0;" # nginx tries another one, but does not judge
	done)
	if [ -n "$ready" ] && [ "$ready" != "$(cat "$file" 2>/dev/null)" ]; then
		echo "$ready" >"$file.new"
		mv "$file.new" "$file"
		${RELOAD:-nginx -s reload}
	fi
	sleep "${INTERVAL:-1}"
done

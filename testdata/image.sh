#!/bin/sh
# image.sh NAME: builds the image by the Dockerfile, with buildah, and prints a container's name, where its files are,
# and how it runs. There need not be a registry: the image that the Dockerfile builds from is made of the machine's own
# programs, Go toolchain, modules and build cache.
set -eu
name=$1
export BUILDAH_ISOLATION=chroot
base=$(mktemp -d)
trap 'rm -r "$base"' EXIT
mkdir -p "$base/etc/ssl/certs" "$base/tmp" "$base/usr"
for dir in bin lib lib64; do ln -s "usr/$dir" "$base/$dir"; done
cp -L /etc/ssl/certs/ca-certificates.crt "$base/etc/ssl/certs/"
printf 'FROM scratch\nCOPY . /\nENV PATH=/goroot/bin:/usr/bin:/bin GOPATH=/go GOCACHE=/gocache\n' >"$base.Dockerfile"
buildah build -q -f "$base.Dockerfile" -t "$name-base" "$base" >&2
rm "$base.Dockerfile"
buildah build -q --format docker --pull=never --from "$name-base" -t "$name" --build-arg VERSION=test -v /usr:/usr:ro \
	-v "$(go env GOROOT):/goroot:ro" -v "$(go env GOMODCACHE):/go/pkg/mod" -v "$(go env GOCACHE):/gocache" . >&2
container=$(buildah from --pull=never "$name")
echo "$container"
buildah mount "$container"
with='{{.OCIv1.Config}} {{.Docker.Config.Healthcheck}}'
buildah inspect --format "$with" "$container"

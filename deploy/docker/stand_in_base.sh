#!/bin/sh
# Makes a file system that stands in for python:3.11-slim-bookworm where no image registry can be
# reached: Debian's own bookworm and its Python 3.11, as one tar archive. It is for testing only.
# usage: stand_in_base.sh ARCHIVE
set -eu

archive=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

# The mirror this machine's apt uses, if it is a bookworm itself; else debootstrap's own.
# shellcheck disable=SC2016  # apt-get expands it.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Origin: Debian' | sed -n 1p)

# No pip: the Dockerfile makes its own with venv, and the last stage should have none.
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm \
    "$root" ${mirror:+"$mirror"} >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; exit 1; }

# The official image has its Python in /usr/local, and neither documentation nor translations.
ln -s /usr/bin/python3 "$root/usr/local/bin/python3"
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*.log \
    "$root"/usr/share/doc "$root"/usr/share/man "$root"/usr/share/locale

tar -C "$root" -cf "$archive" .

#!/bin/bash
# The testbed's `apptainer`, on machines that have none (Debian 12 has no package): the parts that raylab uses, made of
# the kernel's namespaces, squashfs and overlay. It shows that an image and a job script work together. It does not show
# that Apptainer itself accepts them, and it needs root.
#   apptainer run --cleanenv --containall --pid [--nv] [--mount type=bind,"source=A","destination=B"]... IMAGE WORD...
#   apptainer exec ... the same, without the image's own entry point
set -u
fail() { echo "apptainer (testbed): $*" >&2; exit 255; }

outside() { # ACTION OPTION... IMAGE WORD...: read the options, start the namespaces, pass signals on
  local action=$1 binds=(); shift
  while :; do
    case ${1-} in
    --cleanenv | --containall | --pid) ;;
    --nv) [ -e /dev/nvidiactl ] && fail "cannot pass on GPUs"; echo "INFO: no NVIDIA files on this host" >&2 ;;
    --mount)
      local bind='^type=bind,"source=(.*)","destination=(.*)"$'
      [[ $2 =~ $bind ]] || fail "cannot read the mount $2"
      binds+=("${BASH_REMATCH[1]//\"\"/\"}" "${BASH_REMATCH[2]//\"\"/\"}")
      shift
      ;;
    -*) fail "has no option $1" ;;
    *) break ;;
    esac
    shift
  done
  [ -f "${1-}" ] || fail "no image ${1-}"
  [ "$(head -c 4 "$1")" = hsqs ] || fail "$1 is not a squashfs file"
  setpriv --pdeathsig KILL unshare --mount --pid --ipc --fork --kill-child \
    bash "$0" inside "$action" "${#binds[@]}" "${binds[@]}" "$@" <&0 &
  local parent=$! name code
  for name in TERM USR1 USR2 INT HUP; do
    # shellcheck disable=SC2064 # the child of unshare is the container's first process
    trap "kill -$name \$(cat /proc/$parent/task/$parent/children)" $name
  done
  while kill -0 $parent 2>/dev/null; do wait $parent; code=$?; done # a signal ends `wait`, too
  wait $parent; code=$?
  exit $code
}

inside() { # ACTION COUNT [FROM TO]... IMAGE WORD...: make the file system and enter it, as the first process
  local action=$1 binds=("${@:3:$2}") at pair
  shift $((2 + $2))
  local image=$1 base=/mnt; shift
  mount -t tmpfs -o mode=755 tmpfs $base && mkdir $base/image $base/points $base/root || fail "cannot mount"
  mount -t squashfs -o loop,ro,nosuid,nodev "$image" $base/image || fail "cannot mount $image"
  # read-only, because it has no upper layer; the mount points that the image lacks are in a layer over it
  mkdir -p $base/points/etc "$base/points$HOME" && touch $base/points/etc/hosts $base/points/etc/resolv.conf
  for ((at = 1; at < ${#binds[@]}; at += 2)); do mkdir -p "$base/points${binds[at]}"; done
  mount -t overlay -o ro,nosuid,nodev,lowerdir=$base/points:$base/image overlay $base/root || fail "cannot mount"
  cd $base/root || fail "cannot enter"
  mount -t proc proc proc && mount --rbind -o ro /sys sys && mount -t tmpfs -o mode=755 tmpfs dev || fail "cannot mount"
  for at in null zero full random urandom tty; do : >dev/$at && mount --bind /dev/$at dev/$at; done
  mkdir dev/shm dev/pts && mount -t tmpfs -o mode=1777 tmpfs dev/shm && ln -s /proc/self/fd dev/fd || fail "cannot mount"
  for at in hosts resolv.conf; do mount --bind /etc/$at etc/$at || fail "cannot mount /etc/$at"; done
  mount -t tmpfs -o mode=700 tmpfs ".$HOME" && mount -t tmpfs -o mode=1777 tmpfs tmp || fail "cannot mount"
  for ((at = 0; at < ${#binds[@]}; at += 2)); do
    mount --rbind "${binds[at]}" ".${binds[at + 1]}" || fail "cannot mount ${binds[at]}"
  done
  local environment=()
  while IFS= read -r -d '' pair; do
    case $pair in APPTAINERENV_*) environment+=("${pair#APPTAINERENV_}") ;; esac
  done < <(env -0)
  pivot_root . . && umount -l . || fail "cannot enter the image"
  mkdir -p "$HOME" && cd "$HOME" || fail "cannot make $HOME" # it is gone if it was below the private /tmp
  [ "$action" = exec ] || set -- /.singularity.d/runscript "$@"
  exec env -i HOME="$HOME" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin sh -c \
    'for script in /.singularity.d/env/*.sh; do . "$script"; done; exec "$@"' sh env "${environment[@]}" "$@"
}

case ${1-} in
inside) shift; inside "$@" ;;
run | exec) outside "$@" ;;
*) fail "has no verb ${1-}" ;;
esac

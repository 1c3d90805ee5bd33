#!/bin/bash
# The machines of a testbed: each is a set of namespaces with a first process. The nodes' namespaces are nested in those
# of the login node, so that ending its first process ends everything. `up` copies this file into the testbed.
#   machine.sh controller ROOT                      the first process of ctl
#   machine.sh boot ROOT NODE                       on ctl: start a node
#   machine.sh node ROOT NODE                       the first process of a node
#   machine.sh enter ROOT MACHINE COMMAND...        from the host: run COMMAND on ctl or a node; `here`: on this machine,
#                                                   or on ctl if this is the host
#   machine.sh onward ROOT MACHINE DIRECTORY COMMAND...     on ctl: the same, in DIRECTORY
set -u
self=$0 what=$1 root=$2
shift 2
. "$root/lib/settings.sh"
mark=/run/raylab-testbed    # exists on machines of a testbed and contains the testbed's directory

fail() { echo "testbed: $*" >&2; exit 1; }

within() { # SECONDS COMMAND...: repeat the command until it succeeds
  local tries=$(($1 * 100)); shift
  until "$@" >/dev/null 2>&1; do [ $((tries -= 1)) -gt 0 ] || return 1; sleep 0.01; done
}

is_first_process() { # PID WORDS...: check that this is the first process of a machine, and the pid was not reused
  local pid=$1; shift
  [ "$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline")" = "bash $root/lib/machine.sh $* " ]
}

# --- what ctl and nodes have in common ---

record_pid() { # /proc is still that of the parent namespace, so it has our pid as seen from outside
  local pid; read -r pid _ </proc/self/stat
  echo "$pid" >"$root/run/.$1.pid" && mv "$root/run/.$1.pid" "$root/run/$1.pid" || fail "$root was removed" # by `down`, meanwhile
  mount -t proc proc /proc
  umask 022 # not the host's, because all users must be able to use the daemons' files
}

become() { # NAME: set the host name, and mount own directories for sockets, configuration and addresses
  hostname "$1"
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p /run/lock /run/munge
  echo "$root" >$mark
  mount --bind "$root/etc/hosts" /etc/hosts
  mount --bind "$root/etc" /etc/slurm
  ip link set lo up
}

munge() { munged --force --key-file="$root/etc/munge.key" --socket=/run/munge/munge.socket.2 --seed-file=/run/munge/seed \
  --pid-file=/run/munge/munged.pid --log-file="$root/log/munged.$1.log"; }

stay() { # run as the first process: reap orphans until KILL
  trap : TERM INT HUP
  while :; do sleep infinity & wait $!; done
}

# --- ctl ---

controller() {
  record_pid ctl
  become ctl
  ip link add bridge type bridge && ip address add "$network.254/24" dev bridge && ip link set bridge up ||
    fail "cannot create a network bridge: the kernel may not support it"
  [ -z "$fast_network" ] || { ip link add bridge-ib type bridge && ip link set bridge-ib up; } || fail "no second bridge"
  [ -z "$home_mb" ] || full_home
  munge ctl || fail "munged did not start"
  [ ! -e "$root/lib/accounting.sh" ] || . "$root/lib/accounting.sh"
  slurmctld || fail "slurmctld did not start"
  local node
  for node in $nodes; do boot "$node" & done
  wait
  touch "$root/run/booted"
  stay
}

full_home() { # the nodes, whose namespaces are nested in this one, have it as well
  mount -t tmpfs -o mode=700,size="${home_mb}m" tmpfs "$root/shared/home"
  head -c "${home_mb}M" /dev/zero >"$root/shared/home/results"
}

# --- nodes ---

hierarchies() { # the mounts of cgroup version 1 that Slurm uses; some hosts mount two of them as one
  local name; for name in freezer memory cpuset cpu cpuacct devices; do readlink -e "/sys/fs/cgroup/$name"; done | sort -u
}

join_cgroup() { # NODE: move this shell into the node's cgroup
  [ -n "$cgroup" ] || return 0
  local top; for top in $(hierarchies); do
    mkdir -p "$top/$cgroup/$1"
    if [ -e "$top/cpuset.cpus" ]; then # a new cpuset is empty and accepts no process
      local file; for file in cpuset.cpus cpuset.mems; do
        cat "$top/$file" >"$top/$cgroup/$file"; cat "$top/$file" >"$top/$cgroup/$1/$file"
      done
    fi
    if [ -e "$top/memory.limit_in_bytes" ]; then
      echo 1 2>/dev/null >"$top/$cgroup/$1/memory.use_hierarchy" # only possible before it has children; the default in newer kernels
      echo "${memory}M" >"$top/$cgroup/$1/memory.limit_in_bytes"
    fi
    echo "$BASHPID" >"$top/$cgroup/$1/cgroup.procs"
  done
}

plug_in() { # CABLE INTERFACE NODE BRIDGE
  ip link delete "$1" 2>/dev/null # left over from a crash
  ip link add "$1" type veth peer name "$2" netns "$(<"$root/run/$3.pid")"
  ip link set "$1" master "$4" up
}

boot() {
  local node=$1
  rm -f "$root/run/$node".*
  (
    join_cgroup "$node"
    exec setsid unshare --pid --fork --kill-child --mount --net --uts --ipc --cgroup bash "$root/lib/machine.sh" node "$root" "$node"
  ) </dev/null >>"$root/log/$node.log" 2>&1 &
  within 10 test -s "$root/run/$node.pid" || fail "$node did not start: see $root/log/$node.log"
  plug_in "to-$node" eth0 "$node" bridge
  [ -z "$fast_network" ] || plug_in "ib-$node" ib0 "$node" bridge-ib
  within 10 test -e "$root/run/$node.ready" || fail "$node did not start: see $root/log/$node.log"
}

node() {
  local node=$1 top
  record_pid "$node"
  become "$node"
  if [ -n "$cgroup" ]; then # the node sees its own cgroup as the root
    for top in $(hierarchies); do mount --bind "$top/$cgroup/$node" "$top"; done
  fi
  mount -t tmpfs -o mode=1777,size="$((memory / 2))m" tmpfs /dev/shm
  private_tmp "$node"
  address eth0 "$network.${node#n}/24"
  [ -z "$fast_network" ] || { address ib0 "$fast_network.${node#n}/24" && firewall "$node"; } || fail "no second network"
  [ -z "$scratch" ] || install -d -m 1777 "$scratch"
  [ -z "$python" ] || mount --bind "$other_python" "$python"
  munge "$node" || fail "munged did not start"
  slurmd -N "$node" || fail "slurmd did not start"
  touch "$root/run/$node.ready"
  stay
}

address() { # INTERFACE ADDRESS
  within 10 ip link show "$1"
  ip address add "$2" dev "$1"
  ip link set "$1" up
}

firewall() { # NODE: between nodes, let nothing but slurmd's port through on eth0
  local peer
  ip rule add priority 1 ipproto tcp sport 6818 lookup main
  ip rule add priority 2 ipproto tcp dport 6818 lookup main
  for peer in $nodes; do
    [ "$peer" = "$1" ] || ip rule add priority 3 to "$network.${peer#n}" unreachable
  done
}

private_tmp() { # mount an empty /tmp, as after a reboot, with the shared directories in it
  local tmp=$root/nodes/$1/tmp new=/run/tmp path
  rm -rf "$tmp"; mkdir -p "$tmp" "$root/nodes/$1/spool" $new
  chmod 1777 "$tmp"
  if [ -z "$tmp_mb" ]; then mount --bind "$tmp" $new; else mount -t tmpfs -o mode=1777,size="${tmp_mb}m" tmpfs $new; fi
  for path in "${shares[@]}"; do mkdir -p "$new/${path#/tmp/}"; mount --rbind "$path" "$new/${path#/tmp/}"; done
  for path in "${links[@]}"; do mkdir -p "$(dirname "$new/${path#/tmp/}")"; ln -s "$(readlink "$path")" "$new/${path#/tmp/}"; done
  cd /
  mount --move $new /tmp
}

# --- from outside ---

# The command gets TERM when its caller ends: a time-out that kills `srun` on the host must also end it in the testbed
follow="setpriv --pdeathsig TERM"

enter() { # MACHINE COMMAND...
  local machine=$1 here pid; shift
  if here=$(cat $mark 2>/dev/null); then
    [ "$here" = "$root" ] || fail "this is a machine of the testbed $here, not of $root"
    [ "$machine" = here ] || [ "$(hostname)" = ctl ] || fail "$machine cannot be reached from a node"
    [ "$machine" = here ] && run_in "$PWD" "$@"
    onward "$machine" "$PWD" "$@"
  fi
  [ "$machine" = here ] && machine=ctl
  [ "$(id -u)" = 0 ] || fail "only root can reach the testbed $root"
  pid=$(cat "$root/run/ctl.pid" 2>/dev/null) && is_first_process "$pid" controller "$root" || fail "the testbed $root is not up"
  exec nsenter --target "$pid" --mount --uts --ipc --net --pid $follow \
    env -u SLURM_CONF HOME="$root/shared/home" bash "$self" onward "$root" "$machine" "$PWD" "$@"
}

onward() { # MACHINE DIRECTORY COMMAND...
  local machine=$1 directory=$2 pid; shift 2
  [ "$machine" = ctl ] && run_in "$directory" "$@"
  pid=$(cat "$root/run/$machine.pid" 2>/dev/null) && is_first_process "$pid" node "$root" "$machine" || fail "$machine is down"
  join_cgroup "$machine"
  exec nsenter --target "$pid" --mount --uts --ipc --net --pid --cgroup $follow \
    bash "$self" run "$root" "$directory" "$@"
}

run_in() { # DIRECTORY COMMAND...
  cd "$1" 2>/dev/null || cd /
  shift
  exec "$@"
}

case $what in
controller | boot | node | enter | onward) "$what" "$@" ;;
run) run_in "$@" ;;
*) fail "no such part: $what" ;;
esac

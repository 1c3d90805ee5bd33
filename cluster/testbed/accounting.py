"""Slurm's accounting in a testbed: slurmdbd over MariaDB on the login node. Bills, accounts and limits are real then.

There is one account, ACCOUNT, without limits until a test sets them with sacctmgr. Jobs of the partition debug are
billed by weights, the others by CPUs.
"""

import shutil

from cluster.testbed.config import ACCOUNT, Plan
from raylab.errors import UsageError

PACKAGES = "slurmdbd mariadb-server"
TOOLS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
WEIGHTS = "CPU=1.0,Mem=0.5G,GRES/gpu=2.0"
STORAGE = "AccountingStorageType=accounting_storage/none"
PRIORITY = "PriorityType=priority/basic"


def check() -> None:
    """Raise UsageError if this machine lacks what accounting needs."""
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise UsageError(
            "this machine cannot run a testbed with accounting",
            f"not installed: {', '.join(absent)}",
            f"Debian, Ubuntu: apt-get install {PACKAGES}",
        )


def amend(slurm_conf: str) -> str:
    """slurm.conf with accounting. Limits in minutes (GrpTRESMins) need the multifactor priority, which counts usage."""
    for text in (STORAGE, PRIORITY):
        if text not in slurm_conf:
            raise ValueError(f"slurm.conf has no line {text}")
    limits = "AccountingStorageHost=ctl\nAccountingStorageEnforce=associations,limits\nAccountingStorageTRES=gres/gpu"
    usage = "PriorityDecayHalfLife=0\nPriorityUsageResetPeriod=NONE\nPriorityCalcPeriod=1"
    lines = slurm_conf.replace(STORAGE, f"AccountingStorageType=accounting_storage/slurmdbd\n{limits}")
    lines = lines.replace(PRIORITY, f"PriorityType=priority/multifactor\n{usage}")
    return lines.replace("PartitionName=debug ", f"PartitionName=debug TRESBillingWeights={WEIGHTS} ")


def slurmdbd_conf(plan: Plan) -> str:
    """slurmdbd.conf, which Slurm accepts with mode 0600 only. The database knows its user by the socket."""
    return f"""\
AuthType=auth/munge
DbdHost=ctl
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
PidFile=/run/slurmdbd.pid
LogFile={plan.root}/log/slurmdbd.log
DebugLevel=info
"""


def script(plan: Plan) -> str:
    """What the login node runs before slurmctld: both daemons, and the account."""
    return f"""\
# started by machine.sh on ctl, with its functions
mkdir -p /run/mysqld # mariadbd runs beside this shell, which waits for its own children
mariadb-install-db --no-defaults --datadir={plan.root}/state/database --user=root --skip-test-db \\
  --auth-root-authentication-method=socket --auth-root-socket-user=root >/dev/null || fail "no database"
(mariadbd --no-defaults --datadir={plan.root}/state/database --user=root --skip-networking \\
  --socket=/run/mysqld/mysqld.sock --pid-file=/run/mysqld/mysqld.pid --log-error={plan.root}/log/mariadb.log \\
  --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-lock-wait-timeout=900 &)
within 30 test -S /run/mysqld/mysqld.sock || fail "mariadbd did not start"
slurmdbd || fail "slurmdbd did not start"
within 30 sacctmgr --immediate add cluster testbed || fail "slurmdbd does not answer"
sacctmgr --immediate add account {ACCOUNT} >/dev/null || fail "no account"
sacctmgr --immediate add user root account={ACCOUNT} >/dev/null || fail "no user"
sacctmgr --immediate modify user root set DefaultAccount={ACCOUNT} >/dev/null || fail "no default account"
"""

"""Tags by which the jobs of a cluster are recognised: their comments in Slurm."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JobTag:
    """The purpose of a raylab job, written as its Slurm comment. The node provider keeps all its state in tags."""

    cluster: str  # id
    generation: int  # restarts of the head that requested the node
    kind: str  # head or worker
    type: str = ""
    request: str = ""

    def __str__(self) -> str:
        return ":".join(("raylab", self.cluster, str(self.generation), self.kind, self.type, self.request))

    @classmethod
    def parse(cls, text: str) -> "JobTag | None":
        parts = text.split(":")
        if len(parts) != 6 or parts[0] != "raylab" or not parts[2].isdigit():
            return None
        return cls(parts[1], int(parts[2]), *parts[3:])

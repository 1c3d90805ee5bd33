"""How the jobs of a cluster are recognised: by their comments in Slurm."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JobTag:
    """What a job of ours is for, written as its Slurm comment. The node provider keeps all of its state in these."""

    cluster: str  # id
    generation: int  # restarts of the head that asked for the node
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

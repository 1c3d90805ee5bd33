"""What Ray's memory monitor says, as raylab tells it."""

from ray.exceptions import ActorDiedError, OutOfMemoryError

from raylab.distributed.memory_monitor import explain_memory_kill

SAID = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: a42f9) \
was 4.44GB used / 23.54GB limit (0.188649)
OOM kill reason: Memory usage 4645253120B exceeded threshold of 4628943872B (18.3% of 25276502016B limit)
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(14fe34): job ID=01000000, lease ID=000000, task name=A.__init__, required resources={}, \
pid=3483, actual memory used=1.88GB, worker ID=515bcb)
]"""


def test_a_process_that_rays_monitor_ends_is_named_with_its_use() -> None:
    """The words are those of Ray 2.60."""
    explained = explain_memory_kill(OutOfMemoryError(SAID))
    assert explained.startswith("process 3483 on 127.0.0.1 ran out of memory")
    assert "4.44 GB of the node's 23.54 GB" in explained and "1.88 GB of them" in explained


def test_other_words_and_other_deaths() -> None:
    assert explain_memory_kill(OutOfMemoryError("new words\nmore")) == "a worker ran out of memory: new words"
    assert explain_memory_kill(ActorDiedError()) == ""

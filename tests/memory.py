"""Memory of this process, in tests of what bounds it."""

from pathlib import Path


def resident_bytes() -> int:
    """All pages in memory, those of mapped files among them."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024

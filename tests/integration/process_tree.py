"""The processes of this machine: whose child each is."""

from __future__ import annotations

from pathlib import Path


def parents() -> dict[int, tuple[int, str]]:
    """Parent and command of every process of this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, IndexError):
            continue
        found[int(path.name)] = parent, command
    return found


def descendants(root: int, word: str = "") -> list[int]:
    """Processes below `root` whose command holds `word`."""
    tree = parents()

    def below(pid: int) -> bool:
        while pid in tree and pid != root:
            pid = tree[pid][0]
        return pid == root

    return [pid for pid, (_, command) in tree.items() if pid != root and word in command and below(pid)]

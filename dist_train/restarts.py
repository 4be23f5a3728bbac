"""Whether a run that ended early is worth another start: only while starts lead on."""

from __future__ import annotations

import json
from pathlib import Path

from dist_train import checkpoint
from dist_train.run_directory import write_file

NOTE = "restarts.json"


def may_restart(run_dir: Path, limit: int) -> bool:
    """Count an early end of the run; False once more than `limit` in a row brought no newer checkpoint."""
    note = run_dir / NOTE
    before = json.loads(note.read_text()) if note.is_file() else {"step": 0, "in_vain": 0}
    now = newest(run_dir)
    in_vain = 0 if now > before["step"] else before["in_vain"] + 1
    if in_vain > limit:
        return False
    write_file(note, json.dumps({"step": now, "in_vain": in_vain}).encode())
    return True


def begin_to_count(run_dir: Path) -> None:
    """A person has started the run: what was in vain before counts no more."""
    write_file(run_dir / NOTE, json.dumps({"step": newest(run_dir), "in_vain": 0}).encode())


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max(checkpoint.steps(run_dir / "checkpoints"), default=0)

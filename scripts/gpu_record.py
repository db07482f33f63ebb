"""The file of `gpu_check.py`: a line of JSON for each task that begins and for each result, written at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

Measured = dict[str, Any]


class Record:
    """The results of this call and of earlier ones, by the kind and the name of the task.

    A task is not started again if it began in an earlier call and has no result: that call ended during the task.
    """

    def __init__(self, path: Path | None, environment: dict[str, str]) -> None:
        """Read the file, or begin it; without a path nothing is written.

        Raises:
            ValueError: The file is from another device or other versions, or is not a file of results.
        """
        self.environment = environment
        self._path = path
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str], Measured] = {}
        self._left: dict[tuple[str, str], Measured] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not lines:
            self._append({"environment": environment})
            return
        try:
            # The last line is incomplete if the process was killed while it wrote it.
            entries = [json.loads(line) for line in lines if line.endswith("}")]
            self.environment = entries[0]["environment"]
        except (json.JSONDecodeError, LookupError) as error:
            raise ValueError(f"{path} is not a file of results: {error}") from error
        differs = [name for name in environment if name != "date" and environment[name] != self.environment.get(name)]
        if differs:
            pairs = ", ".join(f"{name} {self.environment.get(name)} instead of {environment[name]}" for name in differs)
            raise ValueError(f"{path} has results of {pairs}; give another folder")
        if not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for entry in entries[1:]:
            key = (entry["kind"], entry["name"])
            if "result" in entry:
                self._found[key] = entry["result"]
            else:
                self._found.setdefault(
                    key, {"case": entry["name"], "skipped": "an earlier call ended during this task"}
                )

    def knows(self, kind: str, name: str) -> bool:
        """Whether a task has a result, or began in an earlier call."""
        return (kind, name) in self._found

    def begin(self, kind: str, name: str) -> None:
        """Note that a task begins."""
        self._append({"kind": kind, "name": name})

    def add(self, kind: str, name: str, result: Measured) -> None:
        """Note a result."""
        self._append({"kind": kind, "name": name, "result": result})
        self._found[kind, name] = result

    def leave(self, kind: str, name: str, result: Measured) -> None:
        """Report a task that was not started. Another call will start it."""
        self._left[kind, name] = result

    def results(self, kind: str) -> list[Measured]:
        """The results of one kind, and the reports of the tasks that were not started."""
        found = self._left | self._found
        return [result for (other, _), result in found.items() if other == kind]

    def _append(self, entry: dict[str, Any]) -> None:
        if self._path is None:
            return
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

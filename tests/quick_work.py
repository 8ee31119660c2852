"""Works at a job without doing it: what `python -m experiments.work` leaves, at once. The option `behave` says how."""

import json
import sys
import time
from pathlib import Path


def main(what: str, folder: Path) -> int:
    job = json.loads((folder / "job.json").read_text())
    data, behave = Path(job["data"]), job["options"].get("behave", "")
    with open(folder.parents[2] / "calls.txt", "a") as file:
        file.write(f"{what} {job['name']}\n")
    if behave == f"{what} fails":
        print("error: it is a test", file=sys.stderr)
        return 2
    if behave == "waits":
        (folder / "waits").touch()
        time.sleep(600)
    if what == "data":
        (data / "data.json").write_text("{}")
    else:
        (folder / "result.json").write_text(json.dumps(result_of(job["key"], job["seed"] / 10)))
    return 0


def result_of(key: dict, match: float) -> dict:
    """A result: of the test `short` the exact match `match`, which the last validation had too."""
    return {
        "format": 1,
        "key": key,
        "figures": {
            "parameters": 1000,
            "training_flops": 2e12,
            "training_bytes": 5000,
            "steps": 100,
            "tests": {
                "length-2": {"exact_match": match, "bits_per_byte": 1.5, "count": 10},
                "length-10": {"exact_match": match / 2, "bits_per_byte": 2.5, "count": 10},
                "text": {"exact_match": None, "bits_per_byte": 2.0, "count": 10},
            },
        },
        "curves": {"exact_match": [[50, match / 2], [100, match]], "bits_per_byte": [[50, 3.0], [100, 2.0]]},
        "data": {"documents": 1000, "distinct": 500, "documents_per_step": 5.0},
        "made": {
            "date": "2026-01-02",
            "training_seconds": 60.0,
            "evaluation_seconds": 30.0,
            "machine": {"cpu": "a CPU", "cores": 2, "torch": "2", "python": "3"},
        },
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))

"""Where the files of jobs are.

RUNS/                      runs/experiments
  lock                     held by the process that runs experiments here
  data/KEY/                a prepared corpus: corpus/ (train.jsonl, held-out.jsonl, tests/), shards/, data.json, log.txt
  SET/EXPERIMENT/VARIANT/seed-N/
    job.json               what the job is, by its key
    config.yaml  run/      of the training
    log.txt                what it said
    result.json            appears whole, when all is done
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.spec import Job

JOB, CONFIG, RUN, LOG, RESULT, DATA = "job.json", "config.yaml", "run", "log.txt", "result.json", "data.json"
CORPUS, TRAIN, HELD_OUT, TESTS = "corpus", "train.jsonl", "held-out.jsonl", "tests"


@dataclass(frozen=True)
class Places:
    """The folders of a set's jobs, by other sources in other places where they share a corpus."""

    runs: Path
    set_name: str
    sources: str

    @property
    def lock(self) -> Path:
        """Held while experiments run in this folder."""
        return self.runs / "lock"

    def job(self, job: Job) -> Path:
        """The folder of a job."""
        return self.runs / self.set_name / job.experiment / job.variant / f"seed-{job.seed}"

    def data(self, job: Job) -> Path:
        """The folder of a job's corpus."""
        return self.runs / "data" / f"{job.data_key[:16]}-{self.sources[:8]}"

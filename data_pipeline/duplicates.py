"""What counts as a duplicate."""

from pydantic import Field

from data_pipeline.section import Section


class MinHashConfig(Section):
    """Nearly alike texts, by MinHash: letter case, punctuation and the value of numbers make no difference.

    Two texts that share the part s of their runs of words are found with probability
    1 - (1 - s^hashes_per_bucket)^buckets.
    """

    run_words: int = Field(5, ge=1, description="blocks of a run; a text with fewer is never a duplicate")
    buckets: int = Field(14, ge=1)
    hashes_per_bucket: int = Field(8, ge=1)
    seed: int = Field(1, ge=0, description="of the hash functions")


class DedupConfig(Section):
    """Which duplicates are dropped, in this order."""

    url: bool = Field(False, description="records of one URL; those without a URL stay")
    text: bool = Field(False, description="records of the same prompt and text")
    minhash: MinHashConfig | None = Field(None, description="records of nearly alike text; none: they stay")

    @property
    def wanted(self) -> bool:
        """Whether any duplicates are dropped."""
        return self.url or self.text or self.minhash is not None

"""Suspects 4 and 2: is text cut and encoded at generation as it was for training?"""

from collections.abc import Iterator

import numpy as np

from data_pipeline.pieces import Piece, blocks_of_piece
from data_pipeline.segmentation import segmentation_hash
from tidal_dist.doctor.compare import Difference, array_differences, counted, shown
from tidal_dist.doctor.evidence import Case, Evidence
from tidal_dist.doctor.follow import follow
from tidal_dist.doctor.report import Finding
from tidal_dist.doctor.subject import Subject
from tidal_dist.generation.request import Limits


def tokenizer_hash(subject: Subject) -> Finding:
    """The tokeniser of the shards, of the training and of the loaded model are one."""
    loaded = subject.tokenizer.hash
    return _hashes(
        "tokeniser", loaded, subject.manifest.content["tokenizer_hash"], subject.provenance.tokenizer_hash, subject
    )


def segmentation_rules(subject: Subject) -> Finding:
    """The segmentation of the shards, of the training and of the loaded model is one."""
    loaded = segmentation_hash(subject.tokenizer.segmentation)
    return _hashes(
        "segmentation",
        loaded,
        subject.manifest.content["segmentation_hash"],
        subject.provenance.segmentation_hash,
        subject,
    )


def _hashes(what: str, loaded: str, shards: str, training: str, subject: Subject) -> Finding:
    others = {f"of the shards {subject.manifest.folder}": shards, "of its training": training}
    differing = [f"{owner} {value[:12]}" for owner, value in others.items() if value != loaded]
    where = f"the {what} of {subject.path} has the hash {loaded[:12]}, that {', that '.join(differing)}"
    where = where if differing else ""
    return Finding(len(differing), 0, "hashes that differ", where)


def prompts_are_cut_alike(evidence: Evidence) -> Finding:
    """The blocks into which the decoder cuts a prompt's text are those of the shards."""
    differences: list[Difference] = []
    prompts = [(case, case.blocks[: _prompt_blocks(case)]) for case in evidence.cases if case.begins]
    subject = evidence.subject
    for case, truth in prompts:
        # Told to end at once: only what it feeds of the prompt is of interest.
        fed = follow(subject.exact, subject.tokenizer, subject.device, ["".join(truth)], Limits(1, 1), [[]])[0].tokens
        found = _block_texts(fed.ids[1:], fed.block[1:], evidence)
        differences += array_differences(case, "block", found, truth, range(len(truth)), range(len(truth)))
    return counted(differences, "blocks cut otherwise", f"{len(prompts)} prompts")


def _prompt_blocks(case: Case) -> int:
    """How many blocks of a case were cut as one text that a decoder can be given: its prompt, or all."""
    if case.piece.supervised_from:
        return case.piece.supervised_from
    return len(case.blocks) if case.piece.ends_document else len(case.blocks) - 1


def _block_texts(ids: np.ndarray, block: np.ndarray, evidence: Evidence) -> list[str]:
    """The texts of consecutive blocks of tokens."""
    return [evidence.tokenizer.decode(ids[block == b].tolist()) for b in np.unique(block)]


def chars_become_their_tokens(evidence: Evidence) -> Finding:
    """encode(decode(chars)) is what training has as tokens, for every block of every sampled row."""
    pieces = [(row.names[i], piece) for row in evidence.rows for i, piece in enumerate(row.pieces)]
    wrong = [where for name, piece in pieces for where in _retokenised_otherwise(name, piece, evidence)]
    blocks = sum(len(piece.block_tokens) for _, piece in pieces)
    return Finding(len(wrong), 0, "blocks re-tokenised otherwise", wrong[0] if wrong else "", f"{blocks:,} blocks")


def _retokenised_otherwise(name: str, piece: Piece, evidence: Evidence) -> Iterator[str]:
    ends = np.cumsum(piece.block_tokens)
    for b, block in enumerate(blocks_of_piece(piece)):
        stored = piece.tokens[ends[b] - piece.block_tokens[b] : ends[b]].tolist()
        encoded = list(evidence.tokenizer.encode_block(block))
        if encoded != stored:
            found, truth = (shown(ids, evidence.tokenizer) for ids in (encoded, stored))
            start = 1 + int(ends[b] - piece.block_tokens[b])
            yield f"{name}, block {b} {block!r}, position {start}: tokens [{found}], training has [{truth}]"


def written_blocks_become_their_tokens(evidence: Evidence) -> Finding:
    """The tokens that the decoder makes of the blocks it wrote are those that training has as context."""
    differences: list[Difference] = []
    for case, written in evidence.each():
        differences += _context_differences(case, written.tokens.ids, evidence)
    return counted(differences, "context tokens that differ")


def _context_differences(case: Case, found: np.ndarray, evidence: Evidence) -> Iterator[Difference]:
    tokens = case.laid_out[0]
    n = case.context(case.end - 1)
    ours, truth = ([evidence.tokenizer.name(int(i)) for i in ids] for ids in (found, tokens.ids[:n]))
    return array_differences(case, "token", ours, truth, tokens.block[:n], tokens.position[:n])

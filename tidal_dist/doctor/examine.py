"""The examination: all checks in the order of cause and effect, so that the first that fails names the suspect."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tidal_dist.devices import is_small, one_thread
from tidal_dist.doctor import attention, batches, control, inference, labels, loading, order, preprocessing, quality
from tidal_dist.doctor.evidence import Evidence
from tidal_dist.doctor.report import Check, Finding, Report
from tidal_dist.doctor.sizes import Sizes
from tidal_dist.doctor.subject import Subject
from tidal_dist.errors import ShardError, UserError

_PREPARE_AGAIN = "use the shards that the model was trained on, or train on these"
_EXPORT_AGAIN = "export the checkpoint anew; if that does not help, take an older checkpoint"
_LAYOUT = "data_pipeline/layout.py is the only place that sets {}; find who computes them elsewhere"
_MODEL = "compare model/attention.py and model/positions.py with the definition; train again if training was wrong"


@dataclass(frozen=True)
class _Item:
    """A check to run. `remedy`: what to do if it fails."""

    suspect: int
    name: str
    run: Callable[[Any], Finding]
    remedy: str


# Without one tokeniser and one segmentation nothing that asks for evidence can be compared.
_ON_SUBJECT = (
    _Item(4, "one tokeniser", preprocessing.tokenizer_hash, _PREPARE_AGAIN),
    _Item(4, "one segmentation", preprocessing.segmentation_rules, _PREPARE_AGAIN),
    _Item(7, "settings of the training", loading.settings, _EXPORT_AGAIN),
    _Item(7, "finite weights", loading.finite, "go back to a checkpoint before the loss became NaN"),
    _Item(7, "weights as in the file", loading.weights, _EXPORT_AGAIN),
)
_ON_EVIDENCE = (
    _Item(8, "evaluation mode", inference.evaluation_mode, "call model.eval() before generating"),
    _Item(8, "deterministic", inference.deterministic, "turn off dropout and nondeterministic kernels"),
    _Item(
        4,
        "prompts cut as in the shards",
        preprocessing.prompts_are_cut_alike,
        "cut prompts with data_pipeline/segmentation.py and the tokeniser's own settings",
    ),
    _Item(1, "chars are reversed bytes", order.chars_are_reversed_bytes, "prepare the shards anew"),
    _Item(1, "reversing twice", order.reversing_twice, _LAYOUT.format("the order of a block's bytes")),
    _Item(
        2,
        "chars become their tokens",
        preprocessing.chars_become_their_tokens,
        "prepare the shards anew with the export's tokenizer.json",
    ),
    _Item(10, "labels", labels.labels, _LAYOUT.format("labels")),
    _Item(10, "inputs of training", labels.inputs, _LAYOUT.format("the inputs of blocks")),
    _Item(
        5, "inputs of decoding", control.inputs_are_those_of_training, "feed <bob>, then the chars, as training does"
    ),
    _Item(
        1,
        "written blocks turned round",
        order.written_blocks_are_turned_round,
        "turn a block's bytes round once, as bytes, before decoding them",
    ),
    _Item(
        2,
        "written blocks become their tokens",
        preprocessing.written_blocks_become_their_tokens,
        "encode each finished block by itself, with the training's tokeniser",
    ),
    _Item(1, "positions at training", lambda e: order.positions(e, order.at_training), _LAYOUT.format("positions")),
    _Item(1, "places at training", lambda e: order.places(e, order.at_training), _LAYOUT.format("places")),
    _Item(1, "positions at decoding", lambda e: order.positions(e, order.at_decoding), _LAYOUT.format("positions")),
    _Item(1, "places at decoding", lambda e: order.places(e, order.at_decoding), _LAYOUT.format("places")),
    _Item(1, "decoding equals training", order.decoding_equals_training, _LAYOUT.format("positions and places")),
    _Item(5, "decoding runs through", control.runs_through, "look at what is fed: ids, positions, places, shapes"),
    _Item(5, "end marks end", control.end_marks_end, "end a block at <eob>, the document at <eos>, and nowhere else"),
    _Item(3, "mask", attention.mask, "let model/attention.py ask layout.may_see, and nothing else"),
    _Item(3, "alibi", attention.alibi, _MODEL),
    _Item(3, "rope", attention.rope, _MODEL),
    _Item(9, "packed equals alone", batches.packed_equals_alone, "let may_see compare the documents of a row"),
    _Item(9, "padded equals alone", batches.padded_equals_alone, "let may_see hide padding"),
    _Item(9, "batch equals alone", batches.batch_equals_alone, "look for what is shared between rows"),
    _Item(3, "unseen changes nothing", attention.unseen_changes_nothing, _MODEL),
    _Item(3, "seen changes something", attention.seen_changes_something, _MODEL),
    _Item(3, "one pass equals the oracle", attention.one_pass_equals_the_oracle, _MODEL),
    _Item(
        3,
        "cached equals one pass",
        attention.cached_equals_one_pass,
        "compare generation/cache.py with a pass over the whole document: keys, positions, encodings, what it keeps",
    ),
    _Item(9, "decoding in a batch", batches.decoding_in_a_batch, "let the cache and may_see hide padding"),
    _Item(10, "loss is the cross-entropy", labels.loss_is_the_cross_entropy, "sum over the labels alone; mask nothing"),
    _Item(9, "losses add up", batches.losses_add_up, "sum nats over labels; normalise once, globally"),
    _Item(
        9,
        "loss over ranks",
        batches.loss_over_ranks,
        "normalise by the labels of the whole global batch (training/loss.py), not rank by rank",
    ),
    _Item(10, "gradients of labels", labels.gradients_of_labels, "look for a mask between the loss and the logits"),
    _Item(
        10,
        "gradients equal the oracle's",
        labels.gradients_equal_the_oracle,
        "look for what is detached between the chars and the weights",
    ),
    _Item(10, "gradients of weights", labels.gradients_of_weights, "look for what detaches or overflows"),
    _Item(
        5,
        "generation follows the argmax",
        control.generation_follows_the_argmax,
        "compare generation/decoder.py's choices with the training pass over the same text",
    ),
    _Item(8, "float32", inference.float32_gap, "use float32 or look for a sum in too low a precision"),
    _Item(8, "bf16", inference.bfloat16_gap, "generate in float32"),
    _Item(8, "cached in float32", inference.cached_gap, "look for what the cache keeps in a lower precision"),
    _Item(7, "probe batch repeated", lambda e: loading.probe_is_repeated(e.subject), _EXPORT_AGAIN),
    _Item(
        6, "bits per byte repeated", quality.bits_repeat, "compare the training's validation with this model and data"
    ),
    _Item(6, "exposure gap", quality.exposure_gap, "compare what generation feeds with what training feeds"),
    _Item(6, "ill-formed choices", quality.ill_formed_choices, "the loss is measured on something else than the text"),
    _Item(6, "off-canonical joins", quality.off_canonical_joins, "the model has not seen how blocks follow each other"),
)


def examine(subject: Subject, sizes: Sizes, progress: Callable[[str], object] = bool) -> tuple[Report, Evidence]:
    """Make every check; the report, and the evidence for pictures.

    Where the tokeniser or the segmentation is not the training's, what is encoded with them is not compared.

    Raises:
        UserError: the shards cannot be read, or hold no plan for the training's rows.
    """
    started = time.monotonic()
    with one_thread(is_small(subject.model)):
        checks, evidence, notes = _examined(subject, sizes, progress)
    seconds = time.monotonic() - started
    return Report(str(subject.path), str(subject.manifest.folder), evidence.split, checks, notes, seconds), evidence


def _examined(
    subject: Subject, sizes: Sizes, progress: Callable[[str], object]
) -> tuple[list[Check], Evidence, list[str]]:
    checks = [_run(item, subject, progress) for item in _ON_SUBJECT]
    evidence = Evidence(subject, sizes)
    if all(check.verdict == "holds" for check in checks if check.suspect == 4):
        if not evidence.cases:
            raise ShardError(f"{subject.manifest.folder}: no sampled document has anything to write; add --rows")
        checks += [_run(item, evidence, progress) for item in _ON_EVIDENCE]
        notes = _notes(evidence)
    else:
        checks += [_not_run(item) for item in _ON_EVIDENCE]
        notes = ["nothing else can be compared"]
    return checks, evidence, notes


def _run(item: _Item, argument: Any, progress: Callable[[str], object]) -> Check:
    progress(f"{item.suspect:>2} {item.name}")
    try:
        finding = item.run(argument)
    except UserError:
        raise
    except Exception as error:  # what is examined may be broken in any way; that is the finding
        text = " ".join(str(error).split())
        finding = Finding(float("nan"), 0.0, "the check could not be made", f"{type(error).__name__}: {text}")
    verdict = "holds" if finding.figure <= finding.bound else "fails"
    return Check(item.suspect, item.name, verdict, **vars(finding), remedy=item.remedy)  # type: ignore[arg-type]


def _not_run(item: _Item) -> Check:
    return Check(item.suspect, item.name, "not run", float("nan"), float("nan"), "", "", "", item.remedy)


def _notes(evidence: Evidence) -> list[str]:
    subject = evidence.subject
    notes = [f"{len(evidence.rows)} rows, {len(evidence.cases)} documents, {evidence.sizes.blocks} blocks of each"]
    cut = sum(not p.ends_document for row in evidence.rows for p in row.pieces)
    if cut:
        notes.append(f"{cut} pieces of documents longer than a row are examined as training sees them: cut at blocks")
    if all(case.end - case.first == 1 for case in evidence.cases):
        notes.append("each document writes one block: what later blocks see of earlier ones is not examined")
    if subject.manifest.hash != subject.provenance.manifest_hash:
        notes.append("these are other shards than the training's, of the same tokeniser")
    return notes

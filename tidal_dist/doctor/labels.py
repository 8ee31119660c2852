"""Suspect 10: is every char to be written a label, first char and end mark included, and does each get its gradient?"""

import numpy as np
import torch

from data_pipeline.layout import IGNORED
from data_pipeline.tokenizer import BOB
from tidal_dist.doctor import oracle
from tidal_dist.doctor.batches import nats_of
from tidal_dist.doctor.compare import Difference, array_differences, counted, largest
from tidal_dist.doctor.evidence import Case, Evidence
from tidal_dist.doctor.report import Finding

_GRADIENT_CASES = 8
_ORACLE_CASES = 2
_MAX_ORACLE_TOKENS = 512
# A trained model's losses and gradients are small: what is below this is compared as if it were this.
_SMALLEST = 1e-6


def labels(evidence: Evidence) -> Finding:
    """The labels of training are, for every supervised block, its bytes from the end and its end mark."""
    differences: list[Difference] = []
    total = 0
    for case in evidence.cases:
        chars, found = case.laid_out[1], case.laid_out[2].tolist()
        truth = case.labels_on_paper(case.piece.supervised_from, len(case.blocks))
        ours, paper = ([_name(i, evidence) for i in ids] for ids in (found, truth))
        blocks, positions = _at_least(chars.block, len(truth)), _at_least(chars.position, len(truth))
        differences += array_differences(case, "label", ours, paper, blocks, positions)
        total += len(truth)
    return counted(differences, "labels", f"{total:,} labels")


def inputs(evidence: Evidence) -> Finding:
    """The chars of training are, for every supervised block, `<bob>` and its bytes from the end."""
    differences: list[Difference] = []
    for case in evidence.cases:
        chars = case.laid_out[1]
        truth = [i for b in case.blocks[case.piece.supervised_from :] for i in [BOB, *reversed(b.encode())]]
        ours, paper = ([_name(int(i), evidence) for i in ids] for ids in (chars.ids, truth))
        blocks, positions = _at_least(chars.block, len(truth)), _at_least(chars.position, len(truth))
        differences += array_differences(case, "input", ours, paper, blocks, positions)
    return counted(differences, "chars")


def _at_least(values: list[int], count: int) -> list[int]:
    """The values, filled up by repeating the last: the definition on paper may ask for more slots than there are."""
    found = [int(v) for v in values]
    return found + found[-1:] * (count - len(found))


def _name(i: int, evidence: Evidence) -> str:
    return "none" if i == IGNORED else evidence.tokenizer.name(i)


def loss_is_the_cross_entropy(evidence: Evidence) -> Finding:
    """The model's loss is the sum of -log softmax(logits) over the labels on paper, nothing masked or added."""
    gaps = []
    for case, alone in zip(evidence.cases, evidence.alone, strict=True):
        truth = _cross_entropy(case, alone)
        found = nats_of(case.laid_out, evidence)
        gaps.append(
            (abs(found - truth) / max(_SMALLEST, truth), f"{case.name}, all blocks: loss {found}, should be {truth}")
        )
    return largest(gaps, "relative difference of a loss")


def _cross_entropy(case: Case, logits: torch.Tensor) -> float:
    labels = torch.tensor(case.labels_on_paper(case.piece.supervised_from, len(case.blocks)))
    if len(labels) != len(logits):
        return float("nan")
    return float(-logits.log_softmax(dim=-1).gather(1, labels[:, None]).sum())


def gradients_of_labels(evidence: Evidence) -> Finding:
    """Every supervised char gets the gradient (softmax - label) W, padding none."""
    gaps = []
    for case, alone in list(zip(evidence.cases, evidence.alone, strict=True))[:_GRADIENT_CASES]:
        found = _gradient(case, evidence)
        truth = _gradient_on_paper(case, alone, evidence)
        if found.shape != truth.shape:
            gaps.append((float("inf"), f"{case.name}: {len(found)} chars, should be {len(truth)}"))
            continue
        gap = (found - truth).abs().amax(dim=1) / max(_SMALLEST, float(truth.abs().max()))
        i = int(gap.nan_to_num(float("inf")).argmax())
        sizes = float(found[i].norm()), float(truth[i].norm())
        where = Difference(
            case, int(case.laid_out[1].block[i]), int(case.laid_out[1].position[i]), "size of the gradient", *sizes
        )
        gaps.append((float(gap[i]), str(where)))
    return largest(gaps, "largest difference of a gradient")


def _gradient(case: Case, evidence: Evidence, in_training: bool = False) -> torch.Tensor:
    """Gradient of the model's loss at the last normalised state of each char, (C, width)."""
    model, kept = evidence.subject.exact, []

    def keep(_module: object, _inputs: object, state: torch.Tensor) -> None:
        state.retain_grad()
        kept.append(state)

    hook = model.norm.register_forward_hook(keep)
    batch = evidence.batch(case.laid_out)
    try:
        model.train(in_training)
        model(batch.tokens, batch.chars, batch.labels).backward()
    finally:
        model.eval()
        hook.remove()
    gradient = kept[0].grad
    return torch.zeros_like(kept[0][0]).cpu() if gradient is None else gradient[0].cpu()


def _gradient_on_paper(case: Case, logits: torch.Tensor, evidence: Evidence) -> torch.Tensor:
    labels = torch.tensor(case.labels_on_paper(case.piece.supervised_from, len(case.blocks)))
    if len(labels) != len(logits):
        return logits.new_zeros(len(labels), evidence.config.width)
    error = logits.softmax(dim=-1) - torch.nn.functional.one_hot(labels, logits.shape[1])
    return error @ evidence.subject.exact.output.weight.detach().cpu()


def gradients_of_weights(evidence: Evidence) -> Finding:
    """Every weight matrix gets a finite gradient that is not all zero."""
    model = evidence.subject.exact
    model.zero_grad(set_to_none=True)
    has_drafts = evidence.config.draft_layers is not None  # whose head has a part in training alone
    for case in evidence.cases[:_GRADIENT_CASES]:
        _gradient(case, evidence, in_training=has_drafts)
    wrong = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None or not gradient.any() or not torch.isfinite(gradient).all():
            state = "none" if gradient is None or not gradient.any() else "not finite"
            wrong.append(f"{evidence.subject.path}: gradient of {name} is {state}")
    model.zero_grad(set_to_none=True)
    return Finding(len(wrong), 0, "weights without a finite gradient", wrong[0] if wrong else "")


def gradients_equal_the_oracle(evidence: Evidence) -> Finding:
    """The loss of one block has, at every weight, the gradient that the oracle's loss of it has."""
    gaps = []
    model = evidence.subject.exact
    names, parameters = zip(*model.named_parameters(), strict=True)
    for case in sorted(evidence.cases, key=lambda case: case.context(case.end - 1))[:_ORACLE_CASES]:
        if case.context(case.end - 1) > _MAX_ORACLE_TOKENS:
            continue
        found = torch.autograd.grad(_nats_of_last_block(case, evidence), parameters, allow_unused=True)
        truth = torch.autograd.grad(_nats_on_paper(case, evidence), parameters, allow_unused=True)
        for name, ours, theirs in zip(names, found, truth, strict=True):
            gap, size = _difference(ours, theirs)
            where = (
                f"{case.name}, block {case.end - 1}: gradient of {name} differs by {gap}, its largest value is {size}"
            )
            gaps.append((gap / max(_SMALLEST, size), where))
    return largest(gaps, "largest relative difference of a gradient")


def _nats_of_last_block(case: Case, evidence: Evidence) -> torch.Tensor:
    """The model's loss of the last block of a stretch, within its document."""
    tokens, chars, labels = case.laid_out
    only = np.where(chars.block == case.end - 1, labels, IGNORED)
    batch = evidence.batch((tokens, chars, only))
    evidence.subject.exact.eval()
    return evidence.subject.exact(batch.tokens, batch.chars, batch.labels)


def _nats_on_paper(case: Case, evidence: Evidence) -> torch.Tensor:
    weights = evidence.subject.exact.state_dict(keep_vars=True)
    with torch.device(evidence.subject.device):
        return oracle.sum_of_losses([evidence.sample(case, case.end - 1)], evidence.config, weights)


def _difference(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> tuple[float, float]:
    """Largest difference of two gradients and the largest value of the second; none is zero everywhere."""
    if ours is None or theirs is None:
        only = ours if theirs is None else theirs
        size = 0.0 if only is None else float(only.abs().max())
        return size, size
    return float((ours - theirs).abs().max()), float(theirs.abs().max())

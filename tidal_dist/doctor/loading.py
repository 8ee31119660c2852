"""Suspect 7: is the model in memory the one that was trained?"""

import copy
from collections.abc import Iterator

import torch

from tidal_dist.doctor.report import Finding
from tidal_dist.doctor.subject import Subject
from tidal_dist.export.tensor_files import DTYPES
from tidal_dist.provenance import PROBE_TOLERANCE, probe_loss


def settings(subject: Subject) -> Finding:
    """The loaded model's settings are those of the training's configuration."""
    loaded, trained = subject.model.config.model_dump(), subject.config.model.model_dump()
    wrong = [f"model.{k} is {loaded[k]!r}, the training had {v!r}" for k, v in trained.items() if loaded[k] != v]
    return Finding(len(wrong), 0, "settings that differ", f"{subject.path}: {'; '.join(wrong)}" if wrong else "")


def weights(subject: Subject) -> Finding:
    """Every weight of the file is in the model, bit for bit, and none beside them."""
    wrong = list(_wrong_weights(subject))
    where = f"{subject.path}: {wrong[0]}" if wrong else ""
    return Finding(len(wrong), 0, "weights missing, unexpected or other", where, f"{len(subject.weights)} weights")


def _wrong_weights(subject: Subject) -> Iterator[str]:
    loaded = subject.model.state_dict()
    for name in sorted(loaded.keys() ^ subject.weights.keys()):
        yield f"{name} is {'not in the file' if name in loaded else 'in the file, but not in the model'}"
    for name in sorted(loaded.keys() & subject.weights.keys()):
        found, truth = loaded[name].cpu(), subject.weights[name]
        if found.shape != truth.shape:
            yield f"{name} has shape {tuple(found.shape)}, in the file {tuple(truth.shape)}"
        elif not torch.equal(found, truth):
            i = int((found != truth).flatten().nonzero()[0])
            yield f"{name}[{i}] is {float(found.flatten()[i])}, in the file {float(truth.flatten()[i])}"


def finite(subject: Subject) -> Finding:
    """No weight is NaN or infinite."""
    wrong = [name for name, w in subject.weights.items() if not torch.isfinite(w).all()]
    return Finding(len(wrong), 0, "weights with NaN or infinity", f"{subject.path}: {wrong[0]}" if wrong else "")


def probe_is_repeated(subject: Subject) -> Finding:
    """The loss of the stored probe batch, in the training's precision, is the one that the checkpoint stored."""
    precision, truth = subject.provenance.precision, subject.provenance.probe_loss
    model = copy.deepcopy(subject.model).to(DTYPES[precision])
    found = probe_loss(model, subject.probe, subject.device)
    bound = PROBE_TOLERANCE[precision] * max(1.0, abs(truth))
    where = f"{subject.path}: probe batch, loss {found:.6f} nats a label, the checkpoint stored {truth:.6f}"
    return Finding(abs(found - truth), bound, "nats a label of difference", where, f"loss {found:.6f}")

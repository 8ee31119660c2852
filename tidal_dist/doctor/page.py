"""The report as one HTML page with pictures of a document: the one that fails, or the first."""

import base64
import math
from pathlib import Path

import torch

from data_pipeline.files import replace_file
from data_pipeline.layout import IGNORED
from tidal_dist.doctor.evidence import Case, Evidence, one_pass
from tidal_dist.doctor.report import Report
from tidal_dist.model.maps import attention_maps, char_scores
from tidal_dist.plots.attention import attention_figure
from tidal_dist.plots.canvas import to_png
from tidal_dist.plots.layout import layout_figure
from tidal_dist.plots.loss import loss_figure

_MOST_SLOTS = 400  # a larger picture could not be read


def write_page(report: Report, evidence: Evidence, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    was_compared = any(check.verdict != "not run" for check in report.checks if check.suspect == 1)
    pictures = _pictures(_case(report, evidence), evidence) if was_compared else {}
    replace_file(path, report.as_html(pictures).encode())


def _case(report: Report, evidence: Evidence) -> Case:
    """The shortest of the documents that the failure names, else the shortest of all."""
    where = report.culprit.where if report.culprit else ""
    named = [case for case in evidence.cases if case.name in where]
    return min(named or evidence.cases, key=lambda case: len(case.laid_out[1].ids))


def _pictures(case: Case, evidence: Evidence) -> dict[str, str]:
    """Caption -> PNG in base64."""
    tokens, chars, labels = case.laid_out
    if len(tokens.ids) + len(chars.ids) > _MOST_SLOTS:
        return {}
    model, names = evidence.subject.model, evidence.tokenizer.name
    batch = evidence.batch(case.laid_out)
    maps = attention_maps(model, batch.tokens, batch.chars)
    logits = one_pass(model, evidence.subject.device, [case.laid_out])[0]
    figures = {
        f"{case.name}: its two streams, and who sees whom": layout_figure(
            tokens, chars, labels, names, evidence.config.token_attention
        ),
        "what it attends to, by layer and head": attention_figure(maps, tokens, chars, names),
    }
    if (labels != IGNORED).any() and math.isfinite(float(logits.sum())):
        scores = char_scores(logits, torch.from_numpy(labels).long())
        figures["what each char costs, in nats"] = loss_figure(scores, chars, labels, names)
    return {caption: base64.b64encode(to_png(figure)).decode() for caption, figure in figures.items()}

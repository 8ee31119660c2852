"""The card of an export, `README.md`: what the weights are, what they were trained on, and what was proven of them."""

from collections.abc import Iterator
from typing import Any

from tidal_dist.export.proof import Proof


def card(content: dict[str, Any], proof: Proof) -> str:
    """The card. content: of `config.json`."""
    made, origin = content["provenance"], content["origin"]
    lines = [
        f"# {made['run'].rstrip('/').rpartition('/')[2] or 'model'}, step {made['step']:,}",
        "",
        "A TidalTransformer: it writes block after block of text, each from its last byte to its first. Written by",
        "`tidal export`, which proved it before this folder got its name.",
        "",
        *_facts("Model", _model(content)),
        *_facts("Weights", _weights(content, origin)),
        *_facts("Trained on", _training(made, origin)),
        *_facts("Last validation", [(name, f"{value:.6g}") for name, value in sorted(made["metrics"].items())]),
        *_facts("Left out of the training", [(n, f"row {row:,} on") for n, row in made["quarantine"].items()]),
        "## Proven",
        "",
        *(f"- {line}" for line in proof.lines()),
        *_how_texts_compare(origin),
        "- `tidal verify` proves all of it again, from this folder alone.",
        "",
        "## Files",
        "",
        "| file | bytes | sha256 |",
        "| --- | --- | --- |",
        *(f"| {name} | {file['bytes']:,} | `{file['sha256']}` |" for name, file in content["files"].items()),
        "",
        "## Use",
        "",
        "```python",
        "import tidal_dist",
        "",
        'model = tidal_dist.load("this/folder")',
        'print(model.generate("12 + 34 ="))',
        "```",
        "",
        "```sh",
        'tidal generate this/folder --prompt "12 + 34 ="',
        "tidal verify this/folder",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _facts(title: str, facts: list[tuple[str, str]]) -> Iterator[str]:
    if not facts:
        return
    yield from (f"## {title}", "", "| what | |", "| --- | --- |")
    yield from (f"| {name} | {value} |" for name, value in facts)
    yield ""


def _model(content: dict[str, Any]) -> list[tuple[str, str]]:
    sizes = [(name.replace("_", " "), f"{value}") for name, value in content["model"].items()]
    return [("parameters", f"{content['parameters']:,} in {len(content['tensors'])} tensors"), *sizes]


def _weights(content: dict[str, Any], origin: dict[str, Any]) -> list[tuple[str, str]]:
    made = content["provenance"]
    facts = [("type", content["dtype"]), ("weights and activations in training", made["precision"])]
    tied = ", ".join(f"{alias} = {name}" for alias, name in content["tied"].items())
    facts.append(("tied weights", tied or "none"))
    if average := origin.get("average"):
        steps = ", ".join(f"{step:,}" for step in average["steps"])
        text = (
            f"exponential moving average over the checkpoints of steps {steps}; decay {average['decay']:g} a checkpoint"
        )
        facts.append(("average", f"{text}. Taken at export: the training never computed with these weights"))
    return facts


def _training(made: dict[str, Any], origin: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("run", f"`{made['run']}`"),
        ("checkpoint", f"{origin.get('checkpoint', 'unknown')}, chosen as {origin.get('which', 'unknown')}"),
        ("optimizer steps", f"{made['step']:,}"),
        ("rows", f"{made['rows']:,}"),
        *((f"data: {use['source']}", _use(use)) for use in origin.get("coverage", [])),
        *_corpus(origin.get("corpus")),
        ("ranks, ZeRO stage", f"{origin.get('ranks', 'unknown')}, {origin.get('zero_stage', 'unknown')}"),
        ("rolling hash of the rows", f"`{made['rolling_hash']}`"),
        ("sha256 of the shards' manifest, which names every shard's", f"`{made['manifest_hash']}`"),
        ("hash of the tokeniser", f"`{made['tokenizer_hash']}`"),
        ("hash of the segmentation", f"`{made['segmentation_hash']}`"),
        ("sha256 of the configuration", f"`{made['config_hash']}`"),
    ]
    if origin.get("commit_sha256"):
        facts.append(("sha256 of the checkpoint's COMMIT, which names every file's", f"`{origin['commit_sha256']}`"))
    if "coverage" not in origin:
        facts.append(("data by source", "the checkpoint does not say; `tidal report` on the run does"))
    return facts


def _corpus(corpus: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if not corpus:
        return
    which = f"{corpus['files']:,}, of which {corpus['hashed']:,} were on a disk and are hashed"
    yield "corpus files", f"{which}; sha256 of `corpus.sha256` beside the shards, their list: `{corpus['list_sha256']}`"
    for line in corpus["lines"]:
        sha256, _, path = line.partition("  ")
        yield f"corpus file `{path}`", f"`{sha256}`"


def _use(use: dict[str, Any]) -> str:
    empty = f", {use['quarantined']:,} left empty" if use["quarantined"] else ""
    return f"{use['rows']:,} rows, {use['epochs']:.4f} epochs, {use['repeats']:,} rows repeated{empty}"


def _how_texts_compare(origin: dict[str, Any]) -> list[str]:
    if origin.get("average"):
        return ["- No checkpoint has this average's loss and texts: those found at export are what is compared with."]
    return []

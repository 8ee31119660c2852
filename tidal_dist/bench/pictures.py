"""The picture of each bench's result."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tidal_dist.bench.attention import SWEPT_TOKENS, WAYS
from tidal_dist.plots.bench import bars_figure, growth_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]


def picture(result: Result) -> "Figure":
    """The figure of a result, by its name."""
    return _DRAWN[result["name"]](result)


def _note(result: Result) -> str:
    machine = result["machine"]
    return f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, load {machine['load']} before"


def _layout(result: Result) -> "Figure":
    bars = {way["name"]: way["seconds"] for way in (result["ours"], result["baseline"])}
    title = f"One training step on {result['blocks']:,} blocks: {result['ratio']:.1f} times faster in one pass"
    return bars_figure(title, "seconds", bars, ["one pass"], _note(result))


def _data(result: Result) -> "Figure":
    bars = {"encode_batch, one thread": result["baseline"]["mb_per_second"]}
    bars |= {f"prepare, {count} processes": found["mb_per_second"] for count, found in result["prepare"].items()}
    bars["one loader process"] = result["stream"]["mb_per_second"]
    title = f"From text to shards: {result['ratio']:.1f} times encode_batch"
    return bars_figure(title, "MB of text a second", bars, list(bars)[1:], _note(result))


def _generate(result: Result) -> "Figure":
    bars = {"without a cache": result["alone"]["seconds"] * result["cached_speedup"]}
    bars["with the cache"] = result["alone"]["seconds"]
    title = f"Writing {result['blocks']:,} blocks: {result['cached_speedup']:.1f} times faster with the cache"
    return bars_figure(title, "seconds", bars, ["with the cache"], _note(result))


def _train(result: Result) -> "Figure":
    bars = {name: way["seconds"]["median"] / way["bytes"] * 1e6 for name, way in result["ways"].items()}
    ours = [name for name in bars if name.startswith("two streams")]
    return bars_figure("A training step, for each byte of text", "microseconds", bars, ours, _note(result))


def _attention(result: Result) -> "Figure":
    swept = result["shapes"][: result["swept"]]
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for way in WAYS:
        found = [s for s in swept if way in s["ways"]]
        curves[way] = [s["chars"] for s in found], [s["ways"][way]["seconds"]["median"] for s in found]
    title = f"Attention forward and backward at T = {SWEPT_TOKENS}"
    return growth_figure(title, "char slots C", "seconds", curves, _note(result))


_DRAWN: dict[str, Callable[[Result], "Figure"]] = {
    "layout": _layout,
    "data": _data,
    "generate": _generate,
    "train": _train,
    "attention": _attention,
}

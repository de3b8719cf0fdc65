"""`make bench-evaluate`: what judging and publishing a model takes, for the 10,000 test images and for a million;
writes docs/evaluation.md.

The million are the real ones deformed, as in scale.py. The model is one that was never trained: that costs the same.
"""

import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
from cyclopts import App, Parameter

from lenet.recipe import RECIPES
from pipeline.artifacts import FORMS
from pipeline.checkpoint import EpochMetrics, encode_model
from pipeline.cluster import run_on_ray
from pipeline.download import SourceConfig, fetch
from pipeline.evaluate import evaluate, export
from pipeline.placement import ClusterConfig
from pipeline.promotion import Comparison
from pipeline.publish import publish
from pipeline.sharding import ShardConfig, write_shards
from pipeline.shards import Manifest
from pipeline.source import open_source
from pipeline.storage import Store, open_store, sha256
from pipeline.train import Training, staging
from tests.bench.scale import ROOT, Deformed, watched

app = App(help=__doc__)


def untrained(store: Store, run_id: str) -> Training:
    """The receipt of a training that did nothing."""
    candidate = encode_model(RECIPES["seed"].build_model(10, 0))
    key = f"{staging(run_id)}/candidate.safetensors"
    store.put(key, candidate)
    epoch = EpochMetrics(epoch=1, train_loss=2.3, train_accuracy=0.1, held_out_loss=2.3, held_out_accuracy=0.1,
                         seconds=1.0, images_per_second=1.0, world_size=1)  # fmt: skip
    return Training(history=[epoch], candidate=key, candidate_sha256=sha256(candidate), world_size=1,
                    device="cpu", wall_seconds=1.0, finished=datetime.now(UTC))  # fmt: skip


def judged(store: Store, manifest: Manifest, run_id: str) -> dict[str, float]:
    """Seconds of each step from a trained candidate to a published run."""
    training = untrained(store, run_id)
    at = [time.perf_counter()]
    exported = export(store, run_id, manifest, training)
    at.append(time.perf_counter())
    on_ray = partial(run_on_ray, ClusterConfig(workers=1, gpu="no"))
    evaluation = evaluate(store, run_id, manifest, exported, on_ray)
    at.append(time.perf_counter())
    comparison = Comparison(promoted=False, reasons=["never trained"])
    publish(store, run_id, {"recipe": "seed", "seed": 0}, {}, {}, manifest, training, evaluation, comparison)
    at.append(time.perf_counter())
    steps = (f"export: {', '.join(FORMS)}", "evaluate every form, robustness, speed", "publish, with report and card")
    return {step: after - before for step, before, after in zip(steps, at, at[1:], strict=False)}


@app.default
def main(
    images: Annotated[int, Parameter(help="Test images of the large set.")] = 1_000_000,
    rounds: Annotated[int, Parameter(help="How often the 10,000 are judged; the first time is not counted.")] = 4,
    output: Annotated[Path, Parameter(help="Where the figures go.")] = ROOT / "docs" / "evaluation.md",
) -> None:
    """Measure and write the figures."""
    source = open_source(fetch(SourceConfig()))
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        manifest = write_shards(store, source, ShardConfig())
        first, *found = [judged(store, manifest, f"small-{number}") for number in range(rounds)]
        small = {step: sorted(one[step] for one in found)[len(found) // 2] for step in first}
        total = sorted(sum(one.values()) for one in found)
        print(f"10,000 images: {total} s, the first time {sum(first.values()):.1f} s", flush=True)
        facts = source.facts.model_copy(update={"made_of": {**source.facts.made_of, "test": str(images)}})
        large = write_shards(store, Deformed(source.folder, facts, images, "test"), ShardConfig())
        with watched() as memory:
            seconds = judged(store, large, "large")
        middle = len(memory.largest) // 2
        halves = [max(looks) / 1e6 for looks in (memory.largest[:middle], memory.largest[middle:])]
        print(f"{images:,} images: {sum(seconds.values()):.1f} s; largest process, MB: {halves}", flush=True)
    rows = "\n".join(f"| {step}, s | {small[step]:.1f} | {seconds[step]:.1f} |" for step in small)
    text = f"""\
# Judging a model

Written by `make bench-evaluate` on {psutil.cpu_count()} cores, no GPU: from a trained candidate to a published run,
imports not counted. Of the 10,000 test images the median of {len(found)}, after a first time that took
{sum(first.values()):.1f} s (it imports ONNX and torch.export's compiler, and warms them up); of {images:,},
made of them by small deformations, one, in Ray tasks.

| | 10,000 images | {images:,} images |
| --- | --- | --- |
{rows}
| **all**, s | {total[len(total) // 2]:.1f} ({total[0]:.1f} to {total[-1]:.1f}) | {sum(seconds.values()):.1f} |
| largest of Ray's processes in the first half of that time, MB | | {halves[0]:.0f} |
| and in the second half | | {halves[1]:.0f} |

A process's memory is its own (USS), looked at every second, imports of PyTorch and ONNX Runtime (415 MB) included.
"""
    output.write_text(text)
    print(text)


if __name__ == "__main__":
    app()

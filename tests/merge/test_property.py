"""Random shapes, ranks, dtypes, strategies and numbers of adapters against float64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lorafast
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import read_checkpoint, tensor
from support.handmade import adapter_config, make_adapter, make_base
from support.reference import PREFIX, merge_float64

SIZES = st.integers(1, 70)
FLOATS = st.sampled_from(["F32", "BF16", "F16"])


@st.composite
def adapters_of(draw: st.DrawFn, modules: dict[str, tuple[int, int]]) -> dict[str, object]:
    chosen = draw(st.lists(st.sampled_from(sorted(modules)), min_size=1, unique=True))
    ranks = {module: draw(st.integers(1, 20)) for module in chosen}
    alphas = {module: draw(st.floats(0.125, 64, width=16)) for module in chosen}
    # One rank and alpha stand for all others, as they do in files.
    return {
        "config": adapter_config(
            r=ranks[chosen[0]],
            lora_alpha=alphas[chosen[0]],
            use_rslora=draw(st.booleans()),
            fan_in_fan_out=draw(st.booleans()),
            rank_pattern={m: r for m, r in ranks.items() if r != ranks[chosen[0]]},
            alpha_pattern={m: a for m, a in alphas.items() if a != alphas[chosen[0]]},
        ),
        "ranks": ranks,
        "dtype": draw(FLOATS),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_merge_is_what_float64_says(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4), label="shapes")
    modules = {f"model.layers.{i}.self_attn.q_proj": shape for i, shape in enumerate(shapes)}
    drawn = data.draw(st.lists(adapters_of(modules), min_size=1, max_size=4), label="adapters")
    strategy = data.draw(st.sampled_from(["sequential", "weighted", "average"]), label="strategy")
    weights = None
    if strategy == "weighted":
        values = st.lists(st.floats(-2, 2), min_size=len(drawn), max_size=len(drawn))
        weights = data.draw(values, label="weights")
    dtype = data.draw(FLOATS, label="dtype")
    threads = data.draw(st.integers(1, 4), label="threads")

    with tempfile.TemporaryDirectory() as folder:
        shards = data.draw(st.integers(1, len(modules)), label="shards")
        base = make_base(Path(folder, "base"), modules=modules, dtype=dtype, shards=shards)
        adapters = []
        for number, recipe in enumerate(drawn):
            random = np.random.default_rng(recipe["seed"])
            tensors = {}
            for module, rank in recipe["ranks"].items():
                rows, columns = modules[module]
                for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    values = tensor(random.normal(scale=0.1, size=shape), recipe["dtype"])
                    tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = values
            adapters.append(
                make_adapter(Path(folder, f"a{number}"), tensors, config=recipe["config"])
            )
        output = Path(folder, "out")
        lorafast.merge(base, adapters, output, strategy=strategy, weights=weights, threads=threads)
        before, after = read_checkpoint(base), read_checkpoint(output)
        terms = merge_float64(before, adapters, strategy, weights)
        # A single element may be rounded the other way; of a few it is a large share.
        assert_merged_like_float64(after, terms, identical=0.0)
        assert_rest_untouched(after, before, terms)

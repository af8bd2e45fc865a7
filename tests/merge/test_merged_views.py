"""Views of merges that write nothing: what safe_open has, swaps, and what goes wrong."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
from lorafast._merge.api import options_of
from safetensors import safe_open
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.options import check_signature
from support.pipelines import CLIP_L, UNET, make_pipeline, make_single_file, prefixed, read_pipeline
from support.views import assert_as_written, assert_tensor, raw

Q0 = "model.layers.0.self_attn.q_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the counts are Linux's")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", dtype="BF16", shards=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


def on(path: Path, *modules: str, seed: int = 5, **settings: Any) -> Path:
    """An adapter of these modules alone."""
    chosen = {name: MODULES[name] for name in modules}
    return make_adapter(path, adapter_tensors(chosen, seed=seed), **settings)


def merged_files(
    tmp_path: Path, base: Path, adapters: Any, name: str = "out", **options: Any
) -> dict[str, Tensor]:
    lorafast.merge(base, adapters, tmp_path / name, report=False, sync=False, **options)
    return read_checkpoint(tmp_path / name)


def test_a_view_has_the_options_of_a_plan() -> None:
    check_signature(lorafast.open_merged, options_of("plan"), {"framework", "threads"})


def test_a_view_is_what_safe_open_has_of_the_finished_file(tmp_path: Path, adapter: Path) -> None:
    others = {
        "model.ids": tensor(np.arange(12).reshape(3, 4), "I64"),
        "model.mask": tensor(np.arange(6) % 2, "BOOL"),
        "model.codes": Tensor("F8_E4M3", (4, 4), bytes(range(16))),
        "model.number": tensor(2.5, "F32"),
        "model.nothing": tensor(np.zeros((0, 3)), "F16"),
        "model.pairs": Tensor("F4", (2, 6), bytes(range(6))),
    }
    base = make_base(tmp_path / "base", others=others)
    lorafast.merge(base, adapter, tmp_path / "out", report=False)
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as written,
        lorafast.open_merged(base, adapter) as merged,
    ):
        assert merged.keys() == written.keys()
        assert merged.offset_keys() == written.offset_keys()
        assert merged.metadata() == written.metadata() == {"format": "pt", "note": "kept"}
        for name in written.keys():  # noqa: SIM118 (it is no mapping)
            found, expected = merged.get_tensor(name), written.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert raw(found) == raw(expected), name
            found, expected = merged.get_slice(name), written.get_slice(name)
            assert found.get_shape() == expected.get_shape()
            assert found.get_dtype() == expected.get_dtype()
            if len(expected.get_shape()) == 2 and name != "model.pairs":
                for index in [
                    slice(1, 3),
                    (slice(None), slice(1, 3)),
                    (slice(0, 2), slice(2, None)),
                    (slice(None, 2), slice(None, 1)),
                ]:
                    assert raw(found[index]) == raw(expected[index]), (name, index)


def test_what_a_slice_takes(base: Path, adapter: Path) -> None:
    with lorafast.open_merged(base, adapter) as merged:
        whole, part = merged.get_tensor(Q0), merged.get_slice(Q0)
        for index in [
            ...,
            3,
            -1,
            np.int64(2),
            (1, 2),
            (slice(None), 4),
            (..., slice(2, 9)),
            (slice(2, 5), ...),
            slice(None, None, 3),
            (slice(1, 20, 4), slice(0, 9, 2)),
            (slice(-5, -1), slice(-100, 100)),
            slice(7, 3),
            (),
        ]:
            assert torch.equal(part[index], whole[index]), index
        assert part[1:3].is_contiguous()
        assert part[::2, 1].is_contiguous()
        for wrong, kind, words in [
            (24, IndexError, "24 is beyond dimension 0, which has 24 entries"),
            ((0, -21), IndexError, "-21 is beyond dimension 1"),
            ((1, 2, 3), IndexError, "2 dimensions, and the index is of 3"),
            ((..., ...), IndexError, "one ... at most"),
            (slice(None, None, -1), ValueError, "goes backwards"),
            (None, TypeError, "a number, a range or ..."),
            ([1, 2], TypeError, "a number, a range or ..."),
            (True, TypeError, "a number, a range or ..."),
            (1.5, TypeError, "a number, a range or ..."),
        ]:
            with pytest.raises(kind, match=words) as refused:
                part[wrong]
            assert Q0 in str(refused.value)


def test_halves_of_bytes_are_refused(tmp_path: Path, adapter: Path) -> None:
    others = {"model.pairs": Tensor("F4", (2, 6), bytes(range(6)))}
    base = make_base(tmp_path / "base", others=others)
    with lorafast.open_merged(base, adapter) as merged:
        part = merged.get_slice("model.pairs")
        assert raw(part[1]) == bytes([3, 4, 5])
        assert raw(part[:, 2:4]) == bytes([1, 4])
        with pytest.raises(ValueError, match=r"model\.pairs begins or ends within a byte"):
            part[:, 1:4]


STRATEGIES: dict[str, dict[str, Any]] = {
    "weighted": {"weights": [0.7, -0.25]},
    "average": {"strategy": "average"},
    "slerp": {"strategy": "slerp", "strategy_options": {"t": 0.3}},
    "ties": {"strategy": "ties", "strategy_options": {"density": 0.4}},
    "dare_ties": {"strategy": "dare_ties", "strategy_options": {"density": 0.6}, "seed": 9},
    "della": {
        "strategy": "della",
        "strategy_options": {"density": 0.5, "epsilon": 0.1},
        "weights": [0.9, 0.4],
    },
    "sce": {"strategy": "sce", "strategy_options": {"select_topk": 0.5}},
    "magnitude_prune, float32": {
        "strategy": "magnitude_prune",
        "strategy_options": {"density": 0.5},
        "dtype": "float32",
    },
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy(tmp_path: Path, name: str, threads: int) -> None:
    modules = {"model.layers.0.mlp.up_proj": (2003, 333), "model.layers.0.mlp.down_proj": (37, 203)}
    base = make_base(tmp_path / "base", dtype="BF16", modules=modules)
    adapters = [
        make_adapter(tmp_path / f"adapter-{seed}", adapter_tensors(modules, seed=seed))
        for seed in (1, 2)
    ]
    options = STRATEGIES[name]
    written = merged_files(tmp_path, base, adapters, **options)
    assert_as_written(written, base, adapters, threads=threads, **options)


def test_a_pipeline_has_its_components_before_the_names(tmp_path: Path) -> None:
    base = make_pipeline(tmp_path / "base")
    modules = prefixed("unet.", UNET) | prefixed("text_encoder.", CLIP_L)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    lorafast.merge(base, adapter, tmp_path / "out", report=False)
    written = read_pipeline(tmp_path / "out")
    assert any(name.startswith("vae.") for name in written)
    assert_as_written(written, base, adapter)


def test_a_single_file(tmp_path: Path) -> None:
    module = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors({module: (24, 20)}))
    metadata = {"format": "pt", "modelspec.title": "Toy", "sshs_model_hash": "abcd"}
    base = make_single_file(tmp_path / "sd_xl_base_1.0.safetensors", "F16", metadata)
    written = merged_files(tmp_path, base, adapter)
    assert_as_written(written, base, adapter)
    with lorafast.open_merged(base, adapter) as merged:
        # What would be wrong in the finished file's header is left out here, too.
        assert merged.metadata() == {"format": "pt", "modelspec.title": "Toy"}


def test_a_config_is_that_of_the_finished_model(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base")
    lorafast.merge(base, adapter, tmp_path / "out", dtype="bfloat16", report=False)
    with lorafast.open_merged(base, adapter, dtype="bfloat16") as merged:
        assert merged.config() == json.loads((tmp_path / "out" / "config.json").read_text())
        assert merged.config("generation_config.json") is None


# What goes wrong


def test_an_unknown_name_is_told_with_those_near_to_it(base: Path, adapter: Path) -> None:
    with lorafast.open_merged(base, adapter) as merged:
        for unknown, near in [
            ("layers.0.self_attn.q_proj.weight", Q0),
            (f"base_model.{Q0}", Q0),
            ("model.layers.0.self_attn.q_porj.weight", Q0),
        ]:
            for ask in (merged.get_tensor, merged.get_slice):
                with pytest.raises(lorafast.TensorNotFoundError) as refused:
                    ask(unknown)
                text = str(refused.value)
                assert text.startswith(f"the merged model has no tensor {unknown!r} among its 5; ")
                assert near in text
        with pytest.raises(KeyError, match=r"keys\(\) lists all names"):
            merged.get_tensor("")


def test_a_closed_view_says_so(base: Path, adapter: Path) -> None:
    with lorafast.open_merged(base, adapter) as merged:
        kept = merged.get_tensor(Q0)
        before = raw(kept)
        part, rest = merged.get_slice(Q0), merged.items()
        next(rest)
    assert raw(kept) == before, "what was taken out stays"
    for ask in (
        lambda: merged.get_tensor(Q0),
        lambda: merged.get_slice(Q0),
        lambda: part[:2],
        lambda: part[...],
        lambda: next(rest),
        merged.keys,
        merged.offset_keys,
        merged.metadata,
        merged.config,
        merged.items,
        lambda: merged.swap(adapter),
    ):
        with pytest.raises(ValueError, match="the view is closed"):
            ask()
    merged.close()


def test_files_are_closed_with_the_view(base: Path, adapter: Path) -> None:
    def opened() -> int:
        folder = Path("/proc/self/fd")
        links = [str(path.readlink()) for path in folder.iterdir() if path.is_symlink()]
        return sum(str(base) in link or str(adapter) in link for link in links)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are asked of /proc")
    with lorafast.open_merged(base, adapter) as merged:
        part = merged.get_slice(Q0)
        part[:3]
        assert opened() > 0
    assert opened() == 0


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_a_file_that_changes_is_an_error(base: Path, adapter: Path, what: str) -> None:
    name = "model-00001-of-00002.safetensors" if what == "base" else "adapter_model.safetensors"
    kind = lorafast.CheckpointError if what == "base" else lorafast.AdapterError
    path = (base if what == "base" else adapter) / name
    with lorafast.open_merged(base, adapter) as merged:
        merged.get_tensor(Q0)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(kind, match="changed while it was read"):
            merged.get_tensor(Q0)
        with pytest.raises(kind, match="changed while it was read"):
            merged.get_slice(Q0)[2:4]
        with pytest.raises(kind, match="changed while it was read"):
            dict(merged.items())


def test_what_overflows_is_an_error_of_that_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="F16")
    modules = ["model.layers.0.self_attn.q_proj"]
    adapter = on(tmp_path / "adapter", *modules, lora_alpha=1e9)
    with lorafast.open_merged(base, adapter) as merged:
        merged.get_tensor("model.layers.1.self_attn.q_proj.weight")
        rest = merged.items()
        with pytest.raises(lorafast.NumericError, match=Q0):
            merged.get_tensor(Q0)
        with pytest.raises(lorafast.NumericError, match=Q0):
            dict(rest)
        assert list(rest) == [], "after an error there is nothing more"


def test_arguments_that_cannot_be(base: Path, adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"framework is 'tf'; it is 'pt' \(torch\) or 'numpy'"):
        lorafast.open_merged(base, adapter, framework="tf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads"):
        lorafast.open_merged(base, adapter, threads=0)
    odd = make_adapter(adapter.parent / "odd", adapter_tensors({"a": (2, 2)}))
    with pytest.raises(lorafast.PlanError):
        lorafast.open_merged(base, odd)


# Frameworks


def test_numpy_has_the_same_bytes(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", dtype="F16")
    written = merged_files(tmp_path, base, adapter)
    with lorafast.open_merged(base, adapter, framework="numpy") as merged:
        for name, found in merged.items():
            assert found.dtype == np.float16
            assert (found.shape, found.tobytes()) == (written[name].shape, written[name].data)
        part = merged.get_slice(Q0)[2:5, ::3]
        assert np.array_equal(part, merged.get_tensor(Q0)[2:5, ::3])
        assert part.flags.c_contiguous


def test_numpy_has_bfloat16_from_ml_dtypes(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lorafast.open_merged(base, adapter, framework="numpy") as merged:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(lorafast.MissingDependencyError, match="pip install ml_dtypes"):
            merged.get_tensor(Q0)

        class Stub:
            bfloat16 = np.uint16

        monkeypatch.setitem(sys.modules, "ml_dtypes", Stub)  # type: ignore[arg-type]
        found = merged.get_tensor(Q0)
        assert found.dtype == np.uint16
    with lorafast.open_merged(base, adapter) as merged:
        assert found.tobytes() == raw(merged.get_tensor(Q0))


def test_numpy_needs_no_torch(base: Path, adapter: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None
import lorafast
with lorafast.open_merged(*sys.argv[1:], framework="numpy", dtype="float32") as merged:
    print(len(dict(merged.items())))
try:
    lorafast.open_merged(*sys.argv[1:])
except lorafast.MissingDependencyError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(base), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, message = done.stdout.splitlines()
    assert count == "5"
    assert "lorafast[torch]" in message


def test_tensors_are_the_callers(base: Path, adapter: Path) -> None:
    with lorafast.open_merged(base, adapter) as merged:
        first = merged.get_tensor(Q0)
        before = raw(first)
        first.zero_()
        assert raw(merged.get_tensor(Q0)) == before
        del merged
    gc.collect()
    assert not first.any()


# Swaps


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    return {name for name in one if name not in other or one[name] != other[name]}


def test_a_swap_yields_what_differs(tmp_path: Path, base: Path) -> None:
    attention = [name for name in MODULES if "q_proj" in name]
    up = [name for name in MODULES if "up_proj" in name]
    one = on(tmp_path / "one", *attention, seed=1)
    two = on(tmp_path / "two", attention[0], *up, seed=2)
    adapters: dict[str, list[Path]] = {"one": [one], "two": [two], "both": [one, two], "none": []}
    files = {
        name: merged_files(tmp_path, base, sources, f"out-{name}")
        for name, sources in adapters.items()
        if sources
    }
    files["none"] = read_checkpoint(base)
    with lorafast.open_merged(base, one) as merged:
        now = "one"
        for then in ["two", "one", "both", "two", "none", "both", "both", "one", "none", "none"]:
            swapped = dict(merged.swap(adapters[then]))
            assert swapped.keys() == differing(files[then], files[now]), f"{now} to {then}"
            for name, found in swapped.items():
                assert_tensor(found, files[then][name], name)
            assert merged.adapters == [str(path) for path in adapters[then]]
            assert {name: raw(found) for name, found in merged.items()} == {
                name: expected.data for name, expected in files[then].items()
            }
            now = then


def test_a_view_of_the_base_takes_adapters_later(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", dtype="BF16")
    with lorafast.open_merged(base, [], dtype="float16") as merged:
        narrow = make_adapter(tmp_path / "none", lora_alpha=0)
        assert_as_written(
            merged_files(tmp_path, base, narrow, "same", dtype="float16"), base, [], dtype="float16"
        )
        assert merged.adapters == []
        assert {name for name, _ in merged.swap(adapter)} == {f"{name}.weight" for name in MODULES}
        written = merged_files(tmp_path, base, adapter, dtype="float16")
        assert {name: raw(found) for name, found in merged.items()} == {
            name: expected.data for name, expected in written.items()
        }


def test_a_swap_keeps_the_options_or_changes_them(tmp_path: Path, base: Path) -> None:
    one, two = make_adapter(tmp_path / "one"), on(tmp_path / "two", *MODULES)
    halves = {"weights": [0.5], "dtype": "float32"}
    with lorafast.open_merged(base, one, weights=[0.5], dtype="float32") as merged:
        assert len(list(merged.swap(two))) == len(MODULES)
        written = merged_files(tmp_path, base, two, "half", **halves)
        assert raw(merged.get_tensor(Q0)) == written[Q0].data
        with pytest.raises(ValueError, match="1 weights, and there are 2 adapters now"):
            merged.swap([one, two])
        assert raw(merged.get_tensor(Q0)) == written[Q0].data
        merged.swap([one, two], weights=[0.25, 2])
        written = merged_files(
            tmp_path, base, [one, two], "both", weights=[0.25, 2], dtype="float32"
        )
        assert raw(merged.get_tensor(Q0)) == written[Q0].data
        options = {"strategy": "ties", "strategy_options": {"density": 0.5}}
        merged.swap([one, two], **options)  # type: ignore[arg-type]
        written = merged_files(
            tmp_path, base, [one, two], "ties", weights=[0.25, 2], dtype="float32", **options
        )
        assert raw(merged.get_tensor(Q0)) == written[Q0].data


def test_a_swap_that_fails_changes_nothing(tmp_path: Path, base: Path, adapter: Path) -> None:
    odd = make_adapter(tmp_path / "odd", adapter_tensors({"model.missing": (3, 3)}))
    with lorafast.open_merged(base, adapter) as merged:
        before = {name: raw(found) for name, found in merged.items()}
        running = merged.items()
        next(running)
        for wrong, kind in [(odd, lorafast.PlanError), (tmp_path / "no", FileNotFoundError)]:
            with pytest.raises(kind):
                merged.swap(wrong)
        assert len(list(running)) == len(before) - 1, "what was begun goes on"
        assert {name: raw(found) for name, found in merged.items()} == before
        assert merged.adapters == [str(adapter)]


def test_a_slice_is_of_the_adapters_in_place_and_items_end(tmp_path: Path, base: Path) -> None:
    one, two = make_adapter(tmp_path / "one"), on(tmp_path / "two", *MODULES)
    with lorafast.open_merged(base, one) as merged:
        part, running = merged.get_slice(Q0), merged.items()
        next(running)
        merged.swap(two)
        assert torch.equal(part[3:5], merged.get_tensor(Q0)[3:5])
        with pytest.raises(lorafast.LorafastError, match="swapped in while"):
            list(running)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    random = np.random.default_rng(3)
    embeddings = {EMBEDDINGS: tensor(random.normal(scale=0.05, size=(30, 20)), "BF16")}
    config = {
        "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 30,
    }
    return make_base(tmp_path / "tied", dtype="BF16", others=embeddings, config=config)


def test_a_head_that_is_tied_again_comes_back(tmp_path: Path, tied: Path) -> None:
    head = make_adapter(
        tmp_path / "head", adapter_tensors({"lm_head": (30, 20)}), target_modules=["lm_head"]
    )
    plain = on(tmp_path / "plain", *MODULES)
    with lorafast.open_merged(tied, head) as merged:
        assert "lm_head.weight" in merged.keys()  # noqa: SIM118 (it is no mapping)
        config = merged.config()
        assert config is not None
        assert config["tie_word_embeddings"] is False
        assert raw(merged.get_tensor("lm_head.weight")) != raw(merged.get_tensor(EMBEDDINGS))
        swapped = dict(merged.swap(plain))
        assert "lm_head.weight" not in merged.keys()  # noqa: SIM118
        assert set(swapped) == {"lm_head.weight", *(f"{name}.weight" for name in MODULES)}
        assert raw(swapped["lm_head.weight"]) == raw(merged.get_tensor(EMBEDDINGS))
        swapped = dict(merged.swap(head))
        assert set(swapped) == {"lm_head.weight", *(f"{name}.weight" for name in MODULES)}


def test_copies_of_an_adapter_are_the_same_adapter(tmp_path: Path, base: Path) -> None:
    one, copy = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "copy")
    other = make_adapter(tmp_path / "other", lora_alpha=16)
    with lorafast.open_merged(base, one) as merged:
        assert list(merged.swap(copy)) == []
        assert len(list(merged.swap(other))) == len(MODULES)


# Threads, memory and what is read


def test_any_number_of_threads_use_a_view(tmp_path: Path) -> None:
    modules = {f"model.layers.{n}.mlp.up_proj": (300, 200) for n in range(6)}
    base = make_base(tmp_path / "base", dtype="BF16", modules=modules, shards=2)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    written = merged_files(tmp_path, base, adapter)
    with lorafast.open_merged(base, adapter, threads=2) as merged:
        shared: Iterator[tuple[str, Any]] = merged.items()
        parts = {name: merged.get_slice(name) for name in written}

        def use(number: int) -> list[tuple[str, Any]]:
            found: list[tuple[str, Any]] = []
            for name in written:
                found += [(name, merged.get_tensor(name)), (name, parts[name][...])]
                assert torch.equal(parts[name][number:], found[-1][1][number:])
            return found + list(merged.items()) + list(shared)

        with ThreadPoolExecutor(5) as pool:
            results = list(pool.map(use, range(5)))
    for found in results:
        for name, one in found:
            assert_tensor(one, written[name], name)
    assert sum(len(found) for found in results) == 5 * 3 * len(written) + len(written)


def test_other_threads_go_on_while_a_tensor_is_computed(tmp_path: Path) -> None:
    modules = {"model.layers.0.mlp.up_proj": (4000, 2000)}
    base = make_base(tmp_path / "base", dtype="BF16", modules=modules)
    tensors = adapter_tensors(modules, rank=64)
    adapter = make_adapter(tmp_path / "adapter", tensors, r=64)
    switch = sys.getswitchinterval()
    with lorafast.open_merged(base, adapter, threads=1) as merged:
        done, steps = threading.Event(), 0

        def compute() -> None:
            merged.get_tensor("model.layers.0.mlp.up_proj.weight")
            done.set()

        worker = threading.Thread(target=compute)
        # No thread is made to hand over: one that does not let go by itself is alone until it ends.
        sys.setswitchinterval(1000)
        try:
            worker.start()
            while not done.wait(0.0005):
                steps += 1
            worker.join()
        finally:
            sys.setswitchinterval(switch)
    assert steps > 0


def test_items_that_are_left_unused_stop(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = threading.active_count()
    with lorafast.open_merged(base, adapter) as merged:
        for _ in range(20):
            merged.items()
            next(merged.items())
            merged.swap(adapter)
        assert len(list(merged.items())) == 5
    assert threading.active_count() == before


def make_large(tmp_path: Path, count: int, size: tuple[int, int]) -> tuple[Path, Path]:
    modules = {f"model.layers.{number}.mlp.up_proj": size for number in range(count)}
    from safetensors.numpy import save_file

    base = tmp_path / "base"
    base.mkdir()
    random = np.random.default_rng(0)
    save_file(
        {
            name: random.standard_normal(size, dtype=np.float32)
            for module in modules
            for name in (f"{module}.weight", f"{module.replace('up', 'down')}.weight")
        },
        base / "model.safetensors",
    )
    (base / "config.json").write_text('{"model_type": "llama"}')
    return base, make_adapter(tmp_path / "adapter", adapter_tensors(modules))


@LINUX
def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    base, adapter = make_large(tmp_path, 2, (1500, 1000))
    program = """
import sys, lorafast
from pathlib import Path

def read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

merged = lorafast.open_merged(*sys.argv[1:], framework="numpy")
# All imports are done then.
merged.get_slice("model.layers.0.mlp.down_proj.weight")[:1]
counts = []
for use in (
    lambda: lorafast.open_merged(*sys.argv[1:], framework="numpy"),
    merged.keys,
    merged.metadata,
    lambda: merged.get_slice("model.layers.0.mlp.down_proj.weight")[100:110],
    lambda: merged.get_slice("model.layers.0.mlp.down_proj.weight").get_shape(),
    lambda: merged.get_tensor("model.layers.1.mlp.down_proj.weight"),
    lambda: merged.get_slice("model.layers.0.mlp.up_proj.weight")[800:820],
):
    before = read()
    kept = use()
    counts.append(read() - before)
print(*counts)
"""
    command = [sys.executable, "-c", program, str(base), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    opened, keys, metadata, rows, shape, whole, merged = map(int, done.stdout.split())
    factors = (adapter / "adapter_model.safetensors").stat().st_size
    aside = 20_000  # What Python and /proc read themselves.
    assert opened < 2 * factors + aside
    assert max(keys, metadata, shape) < aside
    assert 10 * 4000 <= rows < 10 * 4000 + aside
    assert 1500 * 4000 <= whole < 1500 * 4000 + aside
    # Tiles begin at whole blocks of rows.
    assert 20 * 4000 <= merged < 40 * 4000 + factors + aside


MEMORY = """
import json, sys, lorafast
from pathlib import Path

def rss():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

merged = lorafast.open_merged(*sys.argv[1:], framework="numpy", threads=2)
before, highest, count = rss(), 0, 0
for name, tensor in merged.items():
    highest, count = max(highest, rss()), count + tensor.nbytes
streamed = highest - before
del tensor
highest = 0
for name in merged.keys():
    tensor = merged.get_tensor(name)
    highest = max(highest, rss())
print(streamed, highest - before, count)
"""


@LINUX
@pytest.mark.alone
def test_memory_is_the_tensor_that_was_asked_for(tmp_path: Path) -> None:
    size = 2000 * 1000 * 4
    base, adapter = make_large(tmp_path, 20, (2000, 1000))
    command = [sys.executable, "-c", MEMORY, str(base), str(adapter)]
    # Arenas of threads that come and go are no memory of a view.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    streamed, single, count = map(int, done.stdout.split())
    assert count == 40 * size
    assert streamed < 64 << 20, "two batches, and what the caller holds"
    assert single < 4 * size + (8 << 20)

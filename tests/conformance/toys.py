"""Bases for the matrix: a module with one layer of each kind, and small transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import models as support
from support.files import Tensor, read_checkpoint
from support.models import Models

# transformers' Conv1D and torch's embedding are the two that are stored (in, out).
CONV1D = ("conv1d", "c_attn", "c_proj", "c_fc")


def is_conv1d(module: str) -> bool:
    return module.rsplit(".", 1)[-1] in CONV1D


def is_transposed(base: str, config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Says of a base's modules whether a product lies turned on their weights."""
    if base == "transposed-experts":
        return lambda module: module != "mlp.router"
    # A parameter that is targeted by its name is taken as it is stored.
    return (lambda module: False) if config.get("target_parameters") else is_conv1d


def layers() -> Any:
    """One layer of every kind that LoRA can lie on, of sizes that no tile or vector divides."""
    import torch
    from transformers.pytorch_utils import Conv1D

    # Its own class, because modules cannot be declared before torch is imported.
    return torch.nn.ModuleDict(
        {
            "emb": torch.nn.Embedding(101, 43),
            "conv1d": Conv1D(77, 43),
            "lin0": torch.nn.Linear(43, 90),
            "lin1": torch.nn.Linear(90, 61),
            "nobias": torch.nn.Linear(61, 37, bias=False),
            "convolution1": torch.nn.Conv1d(13, 21, 5),
            "convolution2": torch.nn.Conv2d(11, 19, (3, 2), stride=2),
            "pointwise": torch.nn.Conv2d(23, 29, 1, bias=False),
            "convolution3": torch.nn.Conv3d(7, 9, (2, 3, 2)),
            "pointwise3": torch.nn.Conv3d(17, 15, 1),
            "grouped": torch.nn.Conv2d(12, 16, 3, groups=4),
            "mha": torch.nn.MultiheadAttention(24, 2),
            "norm": torch.nn.LayerNorm(37),
        }
    )


def experts(*, transposed: bool = False) -> Any:
    """Experts that are one parameter, as (out, in) or as (in, out), and a plain layer."""
    import torch

    class Stacks(torch.nn.Module):
        """Parameters that PEFT finds by their own names."""

        def __init__(self, **shapes: tuple[int, ...]) -> None:
            super().__init__()
            for name, (count, *shape) in shapes.items():
                stored = shape[::-1] if transposed else shape
                value = 0.1 * torch.randn(count, *stored)
                self.register_parameter(name, torch.nn.Parameter(value))
            # What transformers says of its modules.
            self.is_transposed = transposed

    experts = Stacks(gate_up_proj=(3, 34, 21), down_proj=(3, 21, 17))
    layer = {
        "experts": experts,
        "square": Stacks(proj=(3, 19, 19)),
        "single": Stacks(proj=(1, 15, 22)),
        "router": torch.nn.Linear(21, 3),
    }
    return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict(layer)})


MODULES = {
    "layers": layers,
    "experts": experts,
    "transposed-experts": lambda: experts(transposed=True),
}


def load_modules(base: Path, kind: str) -> Any:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(base / "model.safetensors")
    model = MODULES[kind]().to(next(iter(tensors.values())).dtype)
    model.load_state_dict(tensors)
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    return model.eval()


def load(base: Path) -> Any:
    """The model of a directory that this module made, in its own dtype."""
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] == "layers":
        return load_modules(base, config["modules"])
    return support.load(base)


class Toys:
    """Makes bases and adapters through the session's `Models`, each once."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def base(self, kind: str, dtype: str = "F32") -> Path:
        if kind in {"llama", "gpt2"}:
            return getattr(self.models, kind)(dtype)
        return self.models.once(f"{kind}-{dtype}", lambda path: MAKERS[kind](path, dtype))

    def adapter(
        self,
        name: str,
        base: Path,
        settings: dict[str, Any],
        *,
        dtype: str = "F32",
        seed: int = 0,
        vocabulary: int | None = None,
        head: tuple[str, dict[str, Any]] | None = None,
    ) -> Path:
        """An adapter that PEFT made, every tensor of which was then moved by seeded noise.

        Args:
            name: stands for one adapter.
            base: a base in F32.
            settings: of PEFT's LoraConfig.
            dtype: of the saved tensors.
            seed: of the noise.
            vocabulary: resize the model to so many tokens first.
            head: load the base as this class of transformers, with these settings of its config.
        """

        def make(path: Path) -> None:
            import torch
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(seed)
            with quiet():
                model = load_with_head(base, *head) if head else load(base)
                if vocabulary:
                    model.resize_token_embeddings(vocabulary, mean_resizing=False)
                model = get_peft_model(model, LoraConfig(**settings))
                model.save_pretrained(path)
                before = read_state(path)
                perturb(model, saved=set(before))
                model.save_pretrained(path)
            after = read_state(path)
            still = [key for key in after if torch.equal(before[key], after[key])]
            assert not still, f"{name}: not perturbed: {still}"
            if dtype != "F32":
                support.cast_adapter(path, dtype)

        return self.models.once(f"adapter-{name}-{dtype}", make)


def read_state(adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def perturb(model: Any, saved: set[str]) -> None:
    """Add noise to everything that the adapter's file holds: all that LoRA trains, and the rest."""
    import torch

    with torch.no_grad():
        # Tied parameters are one and stay one, under whichever name the file holds them.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif parameter.requires_grad or name in saved or "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if "lora_" in name and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer), alpha=0.1)


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that these configs mean; lorafast's own code runs outside of this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merge_with_peft(base: Path, adapters: Sequence[Path], *, load: Any = load) -> Any:
    with quiet():
        return support.merge_with_peft(base, list(adapters), load=load)


def written(model: Any, path: Path) -> dict[str, Tensor]:
    """What a model's own `save_pretrained` writes: the names of files, not those in memory."""
    if not hasattr(model, "save_pretrained"):
        return support.state(model)
    with quiet():
        model.save_pretrained(path)
    return read_checkpoint(path)


def load_with_head(base: Path, name: str, settings: dict[str, Any]) -> Any:
    """The base's backbone with the head of another class, freshly initialised."""
    import transformers

    kind = getattr(transformers, name)
    if kind.base_model_prefix == "transformer":
        # What some families call so in this class alone; it finds no `model` itself.
        settings = {"key_mapping": {r"^model\.": "transformer."}} | settings
    return kind.from_pretrained(base, **settings).eval()


def make_layers(path: Path, dtype: str) -> None:
    import torch

    torch.manual_seed(11)
    model = layers()
    with torch.no_grad():
        model["emb"].weight.mul_(0.1)
        model["norm"].bias.normal_(std=0.1)
        model["conv1d"].weight.normal_(std=0.1)
        model["conv1d"].bias.normal_(std=0.1)
    save_modules(model, path, dtype, "layers")


def make_experts(path: Path, dtype: str) -> None:
    import torch

    torch.manual_seed(13)
    save_modules(experts(), path, dtype, "experts")


def make_transposed_experts(path: Path, dtype: str) -> None:
    import torch

    torch.manual_seed(14)
    # The type of a model whose experts transformers takes as (in, out).
    settings = {"text_config": {"model_type": "gpt_oss"}}
    save_modules(experts(transposed=True), path, dtype, "transposed-experts", **settings)


def save_modules(model: Any, path: Path, dtype: str, kind: str, **settings: Any) -> None:
    import torch
    from safetensors.torch import save_file

    name = support.TORCH_NAMES[dtype]
    tensors = {key: value.to(getattr(torch, name)) for key, value in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "layers", "modules": kind, "torch_dtype": name} | settings
    (path / "config.json").write_text(json.dumps(config))


def saver(make: Any) -> Any:
    """From a function that makes a model to one that saves it in a dtype."""

    def save(path: Path, dtype: str) -> None:
        import torch

        torch.manual_seed(12)
        make().to(getattr(torch, support.TORCH_NAMES[dtype])).save_pretrained(path)

    return save


def tied_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=72,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=support.VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


SMALL = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": support.VOCABULARY,
    "max_position_embeddings": 64,
}


def llama_backbone() -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**SMALL))


def tied_qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True))


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SMALL, head_dim=12, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20
    )
    return Qwen3MoeForCausalLM(config)


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SMALL))


BERT = {
    "hidden_size": 60,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": support.VOCABULARY,
    "max_position_embeddings": 64,
}


def bert_classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**BERT, num_labels=5))


def bert_backbone() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**BERT))


def gpt2_backbone() -> Any:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(
        GPT2Config(
            n_embd=48,
            n_layer=2,
            n_head=4,
            vocab_size=support.VOCABULARY,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def vit_classifier() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=60,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
        num_labels=7,
    )
    return ViTForImageClassification(config)


MAKERS = {
    "layers": make_layers,
    "experts": make_experts,
    "transposed-experts": make_transposed_experts,
    "tied-llama": saver(tied_llama),
    "llama-backbone": saver(llama_backbone),
    "tied-qwen2": saver(tied_qwen2),
    "qwen3-moe": saver(qwen3_moe),
    "mistral": saver(mistral),
    "bert-classifier": saver(bert_classifier),
    "bert-backbone": saver(bert_backbone),
    "gpt2-backbone": saver(gpt2_backbone),
    "vit-classifier": saver(vit_classifier),
}


def assert_same_outputs(output: Path, theirs: Any, *, load: Any = load, base: Any = None) -> None:
    """The merged directory loads with every tensor used, and computes what PEFT's model does.

    Args:
        output: what was merged, in float32.
        theirs: PEFT's merged model.
        load: loads the directory.
        base: the model without the adapter, where it can tell that the adapter matters.
    """
    with quiet():
        expected = support.outputs(theirs.eval())
        actual = support.outputs(load(output))
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    if base is not None:
        assert (support.outputs(base) - expected).abs().max() > 1e-3 * expected.abs().max()

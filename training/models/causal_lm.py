"""Any other causal language model of Hugging Face's transformers, behind models/interface.py.

Nothing is assumed about an architecture; it is tested when the model is loaded. Packed rows are used only if
the model, with a block-diagonal mask and positions that restart, gives the same logits as for each document
alone. The fused head is used only if states times head equal the model's own logits (not so with soft-capped
or biased heads). A model that fails the tests reads one document at a time, or returns all logits: `head()`
is then None and `hidden` returns logits (N, V).

Weights are read from safetensors only. Code that comes with a model is never run.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from training.models import document_attention, lora
from training.models.batch import Batch, pack
from training.models.config_json import read_config
from training.models.kernels import main_grad
from training.plan.config import ALL_LINEAR, ATTENTION
from training.plan.events import Failure

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-4  # largest difference of a state or logit, relative to the largest of them


class CausalLM(nn.Module):
    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.config = lm.config
        self.packed = self.fused = self.cached = False
        self.self_test_notes: list[str] = []  # what the self-test found, for the log
        self.lora: dict[str, Any] | None = None
        document_attention.install(lm)
        self._self_test()
        collect_gradients(self)

    @staticmethod
    def load(folder: str | Path, attention: str | None = None) -> CausalLM:
        """Reads a folder of Hugging Face files, fp32 on the CPU. Raises Failure("base_model")."""
        values = read_config(folder)
        if values.get("auto_map"):
            raise Failure(
                "base_model",
                f"The model in {folder} needs custom code (auto_map), which is never run.",
                "Choose a model whose architecture is part of transformers.",
            )
        if not any(Path(folder).glob("*.safetensors")):
            raise Failure(
                "base_model",
                f"There are no safetensors weights in {folder}. Other formats are not supported.",
            )
        try:
            lm = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **({"attn_implementation": attention} if attention else {}),
            )
        except Exception as error:  # transformers raises anything: ValueError, KeyError, ImportError, its own
            raise Failure("base_model", f"transformers cannot load the model in {folder}: {error}") from error
        return CausalLM(lm)

    # ---- the interface -------------------------------------------------------------------------------------

    @property
    def context(self) -> int:
        """The longest document it can read, in tokens; 2048 if the model names no limit."""
        return int(getattr(self._text_config, "max_position_embeddings", None) or 2048)

    @property
    def layers(self) -> int:
        return int(getattr(self._text_config, "num_hidden_layers", None) or 0)

    @property
    def attention_width(self) -> int:
        """Features of all query heads of a layer together; 0 for a model without attention."""
        text = self._text_config
        heads = int(getattr(text, "num_attention_heads", None) or 0)
        return heads * int(getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1))

    @property
    def _text_config(self) -> Any:
        return self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config

    def hidden(self, batch: Batch, all_tokens: bool = False) -> Tensor:
        """Final states of the positions that predict a trained token, (N, D), or of all tokens, (T, D), if
        `all_tokens`.

        They are logits, (N, V) or (T, V), if `head()` is None."""
        states = self._packed_states(batch) if self.packed else self._separate_states(batch)  # (T, D or V)
        return states if all_tokens else states[batch.loss_positions]

    def head(self) -> Tensor | None:
        weight: Tensor | None = self.lm.get_output_embeddings().weight if self.fused else None
        return weight

    def set_dropout(self, p: float) -> None:
        """Sets every nn.Dropout, and the probabilities that some architectures keep as plain numbers."""
        for module in self.lm.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            # some architectures keep them as numbers
            for name in (
                "attention_dropout",
                "dropout",
                "hidden_dropout",
            ):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, p)

    @property
    def gradient_checkpointing(self) -> bool:
        return bool(self.lm.is_gradient_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.lm.gradient_checkpointing_disable()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes Hugging Face's files, adapters merged in."""
        lm = self._merged_lm()
        if dtype != torch.float32:
            lm = copy.deepcopy(lm).to(dtype)
        lm.config.dtype = dtype
        lm.save_pretrained(folder)

    def decoder(self, pack: bool = True) -> TransformersDecoder:
        """`pack` changes nothing: transformers reads the weights as they are."""
        return TransformersDecoder(self.lm, self.context, self.cached)

    # ---- adapters ------------------------------------------------------------------------------------------

    def add_lora(
        self,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str] | None,
        seed: int = 0,
        use_dora: bool = False,
        use_rslora: bool = False,
    ) -> None:
        """Freezes the weights and adds peft's adapters, in place. The same `seed` gives the same adapters."""
        import peft

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft computes alpha / r; a fraction is fine
            lora_dropout=dropout,
            use_dora=use_dora,
            use_rslora=use_rslora,
            task_type="CAUSAL_LM",
        )
        linear = self._linear_layers()
        experts = self._expert_weights()
        if tuple(targets or ()) == ALL_LINEAR:
            config.target_modules = lora.short_names(self.lm, self._adaptable(linear, config))
            config.target_parameters = sorted({".".join(n.split(".")[-2:]) for n in experts}) or None
        elif targets and tuple(targets) != ATTENTION:
            config.target_modules = list(targets)
        self._inject(config, seed)
        layers = self._check_lora()
        self.lora = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "targets": sorted(config.target_modules or []) + sorted(config.target_parameters or []),
            "layers": layers,
            "of": len(linear) + len(experts),
            "use_dora": use_dora,
            "use_rslora": use_rslora,
        }
        collect_gradients(self)

    def _linear_layers(self) -> list[str]:
        """Names of the linear layers but the head, as peft knows linear layers."""
        kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
        head = self.lm.get_output_embeddings()
        names = lora.linear_layers(self.lm, None if head is None else head.weight)
        return [name for name in names if isinstance(self.lm.get_submodule(name), kinds)]

    def _expert_weights(self) -> list[str]:
        """Names of parameters with the weights of all experts of a layer, (experts, in, out) or (experts, out,
        in)."""
        return [n for n, p in self.lm.named_parameters() if p.dim() == 3 and n.split(".")[-2] == "experts"]

    @torch.no_grad()
    def _adaptable(self, names: Sequence[str], config: Any) -> list[str]:
        """The linear layers that an adapter can change: without those that peft refuses, and those whose weight is
        read past the layer, as in some Mamba layers."""
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

        used: set[nn.Module] = set()
        modules = {name: self.lm.get_submodule(name) for name in names}
        hooks = [module.register_forward_hook(lambda m, *_: used.add(m)) for module in modules.values()]
        self.hidden(_batch(self._random_documents(17, 33)), all_tokens=True)
        for hook in hooks:
            hook.remove()
        # by the last part of the name: these few tokens are not routed to every expert
        called = {_last(name) for name, module in modules.items() if module in used}
        for end in sorted(called):
            try:
                _check_lora_target_modules_mamba(config, self.lm, end)
            except ValueError:
                called.remove(end)
        return [name for name in names if _last(name) in called]

    def _inject(self, config: Any, seed: int) -> None:
        """Adds adapters. Raises Failure("bad_settings") with peft's reason if the architecture has no such
        layers or cannot have such adapters."""
        import peft

        for p in self.lm.parameters():
            p.requires_grad_(False)
        try:
            # peft draws A from the global generator: fork it, so that the run's own random state is unchanged
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                peft.inject_adapter_in_model(config, self.lm)
        except ValueError as error:
            if config.target_parameters and config.lora_dropout:
                raise Failure(
                    "bad_settings",
                    "Adapters of this model's experts cannot have dropout.",
                    "Set lora_dropout to 0, or name layers in lora_targets.",
                ) from error
            if config.target_parameters and config.use_dora:
                raise Failure(
                    "bad_settings",
                    "Adapters of this model's experts cannot use DoRA.",
                    "Turn use_dora off, or name layers in lora_targets.",
                ) from error
            raise Failure("bad_settings", f"lora_targets do not fit this model: {error}") from error

    def _check_lora(self) -> int:
        """Tries one step of the adapters. Returns how many there are. Raises Failure("bad_settings") if some get no
        gradient, because the model reads the weights of their layers in another way."""
        import peft

        kind: Any = peft.tuners.lora.LoraLayer
        adapters = {n: m for n, m in self.lm.named_modules() if isinstance(m, kind)}
        trained = [p for p in self.lm.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trained:  # B is zero, so A would get no gradient
                p.add_(torch.empty_like(p).uniform_(0.01, 0.02, generator=rng))
        states = self.hidden(_batch(self._random_documents(17, 33)), all_tokens=True)
        grads: Sequence[Tensor | None] = [None] * len(trained)
        if states.requires_grad:
            grads = torch.autograd.grad(states.square().sum(), trained, allow_unused=True)
        moved = {id(p) for p, g in zip(trained, grads, strict=True) if g is not None and g.abs().sum() > 0}
        for p, value in zip(trained, before, strict=True):
            p.data.copy_(value)
        # by the last part of the name: these few tokens are not routed to every expert
        learning = {
            _last(name) for name, m in adapters.items() if any(id(p) in moved for p in m.parameters())
        }
        if idle := [name for name in adapters if _last(name) not in learning]:
            raise Failure(
                "bad_settings",
                f"In this model, an adapter of {_last(idle[0])} would change nothing.",
                "Name other layers in lora_targets, or choose full fine-tuning.",
            )
        return len(adapters)

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Writes the two files of a peft adapter, for `PeftModel.from_pretrained(base_model, folder)`."""
        import peft

        config = copy.copy(self.lm.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(folder)
        weights = peft.get_peft_model_state_dict(self.lm, save_embedding_layers=False)
        tensors = {f"base_model.model.{name}": p.detach().cpu().contiguous() for name, p in weights.items()}
        save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})

    def merged(self) -> CausalLM:
        """A copy with the adapters merged, or the model itself if it has none."""
        return self if self.lora is None else CausalLM(self._merged_lm())

    def _merged_lm(self) -> Any:
        """The transformers model with its adapters merged (a copy), or the model itself if it has none."""
        if self.lora is None:
            return self.lm
        lm = copy.deepcopy(self.lm)
        adapters = {
            n: m for n, m in lm.named_modules() if hasattr(m, "merge") and hasattr(m, "get_base_layer")
        }
        for module in adapters.values():
            module.merge()
        for name, module in adapters.items():
            parent, _, attribute = name.rpartition(".")
            # adapters of several parameters of a module are inside each other: the outermost is replaced
            if not any(name.startswith(f"{outer}.") for outer in adapters):
                setattr(lm.get_submodule(parent), attribute, module.get_base_layer())
        lm._hf_peft_config_loaded = False
        return lm

    # ---- how it is computed --------------------------------------------------------------------------------

    def _packed_states(self, batch: Batch) -> Tensor:
        out = self._inner()(
            input_ids=batch.ids[None],
            attention_mask=document_attention.mask(batch.offsets),
            position_ids=batch.positions[None],
            use_cache=False,
            **({} if self.fused else {"logits_to_keep": 0}),
        )
        states: Tensor = (out.last_hidden_state if self.fused else out.logits)[0]
        return states

    def _separate_states(self, batch: Batch) -> Tensor:
        rows = []
        for start, end in batch.bounds:
            out = self._inner()(input_ids=batch.ids[None, start:end], use_cache=False)
            rows.append((out.last_hidden_state if self.fused else out.logits)[0])
        return torch.cat(rows)

    def _inner(self) -> Any:
        return self.lm.base_model if self.fused else self.lm

    # ---- self-test -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _self_test(self) -> None:
        """Compares the fused head and packed rows with the model as transformers runs it.

        Two short documents, the second longer than attention windows, which are narrowed meanwhile, are run one
        by one and packed. A second packed row differs only in its first document, which must not change the states of
        the second."""
        was_training = self.lm.training
        self.lm.eval()
        first, second, other = self._random_documents(17, 96, 17)
        restore = self._narrow_windows(20)
        # the reference: each document alone, in transformers' own way
        alone = [self.lm(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)]
        truth = torch.cat(alone)  # (T, V)
        scale = float(truth.abs().max()) or 1.0
        self.fused = self._fused_head_holds([first, second], truth, scale)
        self.packed = self._packing_holds([first, second], other, truth, scale)
        self.cached = self._cache_holds(second, alone[1], scale)
        restore()
        self.lm.train(was_training)

    def _narrow_windows(self, size: int) -> Callable[[], None]:
        """Makes every attention window or chunk at most `size` tokens long, so that short documents show how they
        are computed. Returns a function that undoes it."""
        changed = []
        for owner in (self.config, *self.lm.modules()):
            for name in ("sliding_window", "attention_chunk_size"):
                value = getattr(owner, name, None)
                if isinstance(value, int) and value > size:
                    setattr(owner, name, size)
                    changed.append((owner, name, value))

        def restore() -> None:
            for owner, name, value in changed:
                setattr(owner, name, value)

        return restore

    def _fused_head_holds(self, documents: list[Tensor], truth: Tensor, scale: float) -> bool:
        head = self.lm.get_output_embeddings()
        try:
            states = [
                self.lm.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
                for ids in documents
            ]
            wrong = float((torch.cat(states) @ head.weight.t() - truth).abs().max()) / scale
        except (AttributeError, TypeError, RuntimeError) as error:
            self.self_test_notes.append(
                f"its head is not a plain matrix ({error}), so all logits are computed"
            )
            return False
        if not wrong <= TOLERANCE:
            self.self_test_notes.append(
                f"its head is not a plain matrix product (difference {wrong:.1e}), so all logits are computed"
            )
        return wrong <= TOLERANCE

    def _packing_holds(self, documents: list[Tensor], other: Tensor, truth: Tensor, scale: float) -> bool:
        try:
            # the packed row, and one with another first document
            batch, changed = (_batch([d, documents[1]]) for d in (documents[0], other))
            states, moved = self._packed_states(batch), self._packed_states(changed)
        # An architecture may raise anything for a mask or positions that it does not support.
        except Exception as error:
            self.self_test_notes.append(
                f"it does not accept packed rows ({type(error).__name__}), so it reads one document at a time"
            )
            return False
        logits = states @ self.lm.get_output_embeddings().weight.t() if self.fused else states
        wrong = float((logits - truth).abs().max()) / scale
        second = slice(len(documents[0]), None)
        leak = float((moved[second] - states[second]).abs().max() / states.abs().max())
        if not (wrong <= TOLERANCE and leak <= TOLERANCE):
            self.self_test_notes.append(
                f"packed rows change its results (difference {wrong:.1e}, leak {leak:.1e}), so it reads one document at a time"
            )
            return False
        return True

    def _random_documents(self, *lengths: int) -> list[Tensor]:
        """Token ids, (length,) int64 each, always the same."""
        rng, size = torch.Generator().manual_seed(1), int(self.lm.get_input_embeddings().weight.shape[0])
        return [torch.randint(0, size, (min(n, self.context),), generator=rng, device="cpu") for n in lengths]

    def _cache_holds(self, document: Tensor, truth: Tensor, scale: float) -> bool:
        """Compares two steps of generation with the logits of the whole document, (T, V)."""
        ids = document.tolist()
        decoder = TransformersDecoder(self.lm, self.context)
        try:
            cache, first = decoder.prefill(ids[:-2], len(ids))
            steps = torch.stack([first, *(decoder.step([cache], [token])[0] for token in ids[-2:])])
        # An architecture may raise anything for a kind of cache that it does not support.
        except Exception as error:
            why = type(error).__name__
        else:
            wrong = float((steps - truth[-3:]).abs().max()) / scale
            if wrong <= TOLERANCE:
                return True
            why = f"difference {wrong:.1e}"
        self.self_test_notes.append(
            f"generation with a cache changes its results ({why}), so every token reads the whole text again"
        )
        return False


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _batch(documents: list[Tensor]) -> Batch:
    return pack([(d.numpy(), torch.ones(len(d)).numpy()) for d in documents])


def collect_gradients(model: nn.Module) -> None:
    """Makes autograd's gradients go to `main_grad`, a view of one flat buffer (see kernels.py)."""
    for p in model.parameters():
        if p.requires_grad and not getattr(p, "collected", False):
            p.register_post_accumulate_grad_hook(_collect)
            p.collected = True  # type: ignore[attr-defined]  # ours


def _collect(p: Tensor) -> None:
    if p.grad is not None:  # None from the fused head, which adds its gradient itself
        main_grad(p).add_(p.grad)
        p.grad = None


# ---- generation --------------------------------------------------------------------------------------------


class TransformersDecoder:
    """decoder.Decoder on transformers' own caches. Sequences are advanced one after another.

    Without `cached` a cache is the ids read so far, which every step reads again."""

    def __init__(self, lm: Any, context: int, cached: bool = True) -> None:
        self.lm, self.context, self.cached = lm, context, cached
        self.device = lm.device
        # Mamba has its own name for a cache, and would not use one under any other.
        accepted = inspect.signature(lm.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], room: int, all_tokens: bool = False) -> tuple[Any, Tensor]:
        cache: Any = transformers.DynamicCache(config=self.lm.config) if self.cached else []
        logits = self._run(cache, ids, all_tokens)  # (T or 1, V)
        return cache, logits if all_tokens else logits[-1]

    def fork(self, cache: Any) -> Any:
        return copy.deepcopy(cache)

    @torch.inference_mode()
    def step(self, caches: Sequence[Any], ids: Sequence[int]) -> Tensor:
        return torch.cat([self._run(cache, [token], False) for cache, token in zip(caches, ids, strict=True)])

    def _run(self, cache: Any, ids: Sequence[int], all_tokens: bool) -> Tensor:
        was_training = self.lm.training
        self.lm.eval()
        if self.cached:
            known = {self.cache_name: cache, "use_cache": True}
        else:
            cache += ids
            ids, known = cache, {"use_cache": False}
        tokens = torch.tensor([list(ids)], device=self.device)
        out = self.lm(input_ids=tokens, logits_to_keep=0 if all_tokens else 1, **known)
        self.lm.train(was_training)
        logits: Tensor = out.logits[0]
        return logits

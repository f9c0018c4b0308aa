"""The chat templates of ten model families, each with a small tokenizer that has the family's special tokens.

Templates come from the package `trl` (see requirements-templates.txt). It lacks some families: for these there
are templates of our own with the same traits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

TEMPLATES = Path(__file__).parents[3] / ".tools/trl/trl/chat_templates"
# How Llama 3 and most others since split a text before BPE.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# --- templates of our own -------------------------------------------------------------------------

SMOLLM2 = (  # a system message if there is none; no tools
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM3 = (  # the date in the system message, a generation tag, an empty reasoning where there is none
    "{%- set head = namespace(text='') -%}"
    "{%- if messages[0].role == 'system' -%}{%- set head.text = messages[0].content.rstrip() -%}{%- endif -%}"
    "{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\n\n' ~ head.text -}}"
    "{%- if tools -%}{{- '\n\n### Tools\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\n' ~ (tool.function | string) -}}{%- endfor -%}{{- '\n</tools>' -}}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- for m in messages -%}{%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}"
    "{%- if m.role == 'assistant' -%}{% generation %}"
    "{{- '<|im_start|>assistant\n<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>\n' ~ m.content.lstrip('\n') -}}"
    "{%- for call in m.tool_calls or [] -%}"
    "{{- '<tool_call>' ~ ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) ~ '</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}{% endgeneration %}"
    "{%- else -%}{{- '<|im_start|>' ~ ('user' if m.role == 'tool' else m.role) ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
PHI4_MINI = (  # a second end token after the last turn, unless an answer follows
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (  # roles must alternate, tools before the last user message, ids of nine characters
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- set ns = namespace(count=0) -%}"
    "{%- for m in turns -%}{%- if m.role in ('user', 'assistant') and not m.tool_calls -%}"
    "{%- if (m.role == 'user') != (ns.count % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user and assistant') -}}{%- endif -%}"
    "{%- set ns.count = ns.count + 1 -%}{%- endif -%}{%- endfor -%}"
    "{{- bos_token -}}"
    "{%- set last = turns | selectattr('role', 'equalto', 'user') | list | last -%}"
    "{%- for m in turns -%}"
    "{%- if m.role == 'user' -%}"
    "{%- if tools and m == last -%}{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{{- '[INST]' -}}"
    "{%- if system is defined and m == last -%}{{- system ~ '\n\n' -}}{%- endif -%}{{- m.content ~ '[/INST]' -}}"
    "{%- elif m.tool_calls -%}{{- '[TOOL_CALLS][' -}}"
    "{%- for call in m.tool_calls -%}"
    "{%- if call.id is not defined or call.id | length != 9 -%}"
    "{{- raise_exception('Tool call ids have nine characters') -}}{%- endif -%}"
    "{{- (call.function | tojson)[:-1] ~ ', \"id\": \"' ~ call.id ~ '\"}' ~ (']' if loop.last else ', ') -}}"
    "{%- endfor -%}{{- eos_token -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' ~ m.content ~ eos_token -}}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '[TOOL_RESULTS]{\"content\": ' ~ (m.content | tojson) ~ ', \"call_id\": \"' ~ m.tool_call_id ~ '\"}[/TOOL_RESULTS]' -}}"
    "{%- endif -%}{%- endfor -%}"
)
GRANITE4 = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' -%}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system -}}"
    "{%- if tools -%}{{- '\n\nYou may call these tools:\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}{{- '\n</tools>' -}}{%- endif -%}"
    "{{- '<|end_of_text|>\n' -}}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '<|start_of_role|>user<|end_of_role|>' + m.content + '<|end_of_text|>\n' -}}"
    "{%- elif m.role == 'assistant' -%}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' + (m.content or '') -}}"
    "{%- for call in m.tool_calls or [] -%}"
    "{{- '\n' if m.content or not loop.first -}}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' -}}'
    "{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}"
    "{{- '}\n</tool_call>' -}}{%- endfor -%}{{- '<|end_of_text|>\n' -}}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '<|start_of_role|>user<|end_of_role|>\n<tool_response>\n' + m.content + '\n</tool_response><|end_of_text|>\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}"
)
OLMO2 = (  # begins with its end token; the role marks are plain text
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

# --- families -------------------------------------------------------------------------------------

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
THINKING = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3 = (*LLAMA3, "<|eom_id|>", "<|python_tag|>")
DEEPSEEK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
DEEPSEEK_TOOLS = tuple(
    f"<｜tool▁{name}｜>"
    for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin", "outputs▁end")
)
LFM2 = ("<|startoftext|>", "<|im_end|>", "<|im_start|>", "<|pad|>")
LFM2_TOOLS = tuple(
    f"<|tool_{name}_{end}|>" for name in ("list", "call", "response") for end in ("start", "end")
)


MISTRAL_TOOLS = ("AVAILABLE_TOOLS", "TOOL_RESULTS", "INST")
MISTRAL_TOKENS = (
    "<s>",
    "</s>",
    "[TOOL_CALLS]",
    *(f"[{end}{name}]" for name in MISTRAL_TOOLS for end in ("", "/")),
)


@dataclass(frozen=True)
class Family:
    template: str  # a file of trl's, or the template itself
    eos: str
    bos: str = ""
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # added tokens that are not marked as special
    strips: tuple[str, ...] = ()  # special tokens that take white space after them with them
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def text(self) -> str:
        if not self.template.endswith(".jinja"):
            return self.template
        path = TEMPLATES / self.template
        if not path.is_file():
            pytest.fail("The chat templates are missing: run bin/setup dev.")
        return path.read_text(encoding="utf-8")


FAMILIES = {
    "Qwen3": Family("qwen3.jinja", "<|im_end|>", special=CHATML, added=THINKING),
    "Llama 3.1": Family("llama3_1.jinja", "<|eot_id|>", "<|begin_of_text|>", LLAMA3),
    "Llama 3.2": Family("llama3_2.jinja", "<|eot_id|>", "<|begin_of_text|>", LLAMA3),
    "Gemma 3": Family(
        "gemma3.jinja", "<eos>", "<bos>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("\n\n",)
    ),
    "SmolLM2": Family(SMOLLM2, "<|im_end|>", "<|im_start|>", CHATML),
    "SmolLM3": Family(SMOLLM3, "<|im_end|>", special=CHATML, added=THINKING),
    "Phi-4-mini": Family(
        PHI4_MINI,
        "<|endoftext|>",
        "<|endoftext|>",
        ("<|endoftext|>",),
        strips=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "Mistral": Family(
        MISTRAL,
        "</s>",
        "<s>",
        MISTRAL_TOKENS,
        config=(("add_bos_token", True),),
    ),
    "Granite 4": Family(
        GRANITE4,
        "<|end_of_text|>",
        "<|end_of_text|>",
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
    ),
    "LFM2": Family("lfm2_v2.jinja", "<|im_end|>", "<|startoftext|>", (*LFM2, *LFM2_TOOLS)),
    "LFM2, first": Family("lfm2.jinja", "<|im_end|>", "<|startoftext|>", (*LFM2, *LFM2_TOOLS)),
    "DeepSeek-R1-distill": Family(
        "deepseek_r1_distill.jinja",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        DEEPSEEK[:2],
        (*DEEPSEEK[2:], *DEEPSEEK_TOOLS, "<think>", "</think>"),
        config=(("add_bos_token", True),),
    ),
    "OLMo 2": Family(OLMO2, "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>",)),
}


@cache
def _vocabulary() -> str:
    """A byte-level tokenizer with a few hundred merges, so that characters join to tokens as in real ones."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    backend.train_from_iterator([words, "\n\n\n \n\n  \n"] * 4, trainer)
    return backend.to_str()


def write_tokenizer(folder: Path, family: Family, template: str | None = None) -> Path:
    """The family's tokenizer in Hugging Face's files, with its own chat template or another one."""
    backend = Backend.from_str(_vocabulary())
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in family.special])
    backend.add_special_tokens([AddedToken(t, normalized=False, rstrip=True) for t in family.strips])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.added])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos,
        **({"bos_token": family.bos} if family.bos else {}),
        **dict(family.config),
        "chat_template": template or family.text,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

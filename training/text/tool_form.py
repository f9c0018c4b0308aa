"""How tools are written for chat templates that have no form of their own for them (GPT-2's, the starter's,
SmolLM2's): the form of Hermes and Qwen.

    <tools>, one definition per line, in the system message · <tool_call>{"name", "arguments"}</tool_call> in an
    answer · <tool_response> in the next user turn

`with_tools` puts it in front of the base's template, so that one template says everything: training,
inference and the exported model use the same text.
"""

from __future__ import annotations

INTRODUCTION = "You can call these functions, each described by a JSON schema:\\n<tools>"
INSTRUCTIONS = (
    "\\n</tools>\\n\\nTo call a function, answer with its name and arguments as JSON:\\n"
    '<tool_call>\\n{\\"name\\": \\"...\\", \\"arguments\\": {...}}\\n</tool_call>'
)
# Replaces `messages` by a list without tools. Everything is inside one condition, so that a conversation
# without tools is rendered by the base's template alone.
PREAMBLE = (
    "{%- set tool_form = namespace(used=false, turns=[], tools='', text='', before='') -%}"
    "{%- if tools -%}{%- set tool_form.used = true -%}{%- endif -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'tool' or m['tool_calls'] -%}"
    "{%- set tool_form.used = true -%}{%- endif -%}{%- endfor -%}"
    "{%- if tool_form.used -%}"
    "{%- if tools -%}"
    f'{{%- set tool_form.tools = "{INTRODUCTION}" -%}}'
    "{%- for tool in tools -%}{%- set tool_form.tools = tool_form.tools ~ '\\n' ~ (tool | tojson) -%}{%- endfor -%}"
    f'{{%- set tool_form.tools = tool_form.tools ~ "{INSTRUCTIONS}" -%}}'
    "{%- if SYSTEM and messages[0]['role'] != 'system' -%}"
    "{%- set tool_form.turns = [{'role': 'system', 'content': tool_form.tools}] -%}"
    "{%- set tool_form.tools = '' -%}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- set tool_form.text = m['content'] or '' -%}"
    "{%- if m['role'] == 'tool' -%}"
    "{%- set tool_form.text = '<tool_response>\\n' ~ tool_form.text ~ '\\n</tool_response>' -%}"
    "{%- endif -%}"
    "{%- for call in m['tool_calls'] or [] -%}"
    "{%- set tool_form.text = tool_form.text ~ ('\\n' if tool_form.text else '') ~ '<tool_call>\\n{\"name\": ' ~"
    " (call['function']['name'] | tojson) ~ ', \"arguments\": ' ~ (call['function']['arguments'] | tojson) ~"
    " '}\\n</tool_call>' -%}"
    "{%- endfor -%}"
    "{%- if tool_form.tools and m['role'] in ('system', 'user') -%}"
    "{%- set tool_form.text = (tool_form.text ~ '\\n\\n' ~ tool_form.tools) if m['role'] == 'system' else"
    " (tool_form.tools ~ '\\n\\n' ~ tool_form.text) -%}"
    "{%- set tool_form.tools = '' -%}"
    "{%- endif -%}"
    "{%- if m['role'] == 'tool' and tool_form.before == 'tool' -%}"  # several results make one user turn
    "{%- set tool_form.text = tool_form.turns[-1]['content'] ~ '\\n' ~ tool_form.text -%}"
    "{%- set tool_form.turns = tool_form.turns[:-1] -%}"
    "{%- endif -%}"
    "{%- set tool_form.turns = tool_form.turns +"
    " [{'role': 'user' if m['role'] == 'tool' else m['role'], 'content': tool_form.text}] -%}"
    "{%- set tool_form.before = m['role'] -%}"
    "{%- endfor -%}"
    "{%- set messages = tool_form.turns -%}"
    "{%- set tools = none -%}"
    "{%- endif -%}"
)


def with_tools(template: str, *, system: bool) -> str:
    """The template with our form for tools in front. `system`: whether it takes a system message; without
    one, the definitions begin the first user message."""
    return PREAMBLE.replace("SYSTEM", "true" if system else "false") + template

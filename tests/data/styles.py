"""Chat templates in the styles that real models use, written for these tests: what a renderer must cope with.

Each names the control tokens it needs. Does not know: the renderer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    source: str
    tokens: tuple[str, ...] = ()
    system: bool = True  # takes a system turn
    trims: bool = False  # strips white space around content
    tools: bool = False
    thinking: bool = False  # rewrites earlier answers
    end: str = "<|im_end|>"


_GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

STYLES: dict[str, Style] = {
    "chatml": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        + _GENERATION
    ),
    "chatml-default-system": Style(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        + _GENERATION
    ),
    "llama3-like": Style(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|head|>' + m.role + '<|/head|>\\n\\n' + m.content | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}",
        tokens=("<|head|>", "<|/head|>", "<|eot|>"),
        trims=True,
        end="<|eot|>",
    ),
    "gemma-like": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '</turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}",
        tokens=("<turn>", "</turn>"),
        system=False,
        trims=True,
        end="</turn>",
    ),
    "mistral-like": Style(
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' and loop.first %}{% set ns.system = m.content + '\\n\\n' %}"
        "{% elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + '[/INST]' }}{% set ns.system = '' %}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
        "{% else %}{{ raise_exception('only user and assistant roles, after one system turn') }}{% endif %}"
        "{% endfor %}",
        tokens=("[INST]", "[/INST]"),
        end="</s>",
    ),
    "strips-thinking": Style(
        "{% for m in messages %}{% set c = m.content %}"
        "{% if m.role == 'assistant' and not loop.last and '</think>' in c %}"
        "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}{% endfor %}" + _GENERATION,
        thinking=True,
    ),
    "never-closes": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
        end="<|user|>",
    ),
    "emits-bos": Style(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}" + _GENERATION
    ),
    "tools": Style(
        "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + {'name': c.function.name, 'arguments': "
        "c.function.arguments} | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + _GENERATION,
        tools=True,
    ),
    "no-control-tokens": Style(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    ),
    "generation-tags": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}{% endfor %}" + _GENERATION
    ),
}

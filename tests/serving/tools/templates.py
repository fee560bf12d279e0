"""Miniature chat templates, one of each form in which calls are written, of our own."""

_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{ASSISTANT}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>tool\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{PROMPT}{% endif %}"
)
_TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>\n{% endif %}"
)


def _made(assistant: str, prompt: str = "") -> str:
    turns = _TURNS.replace("{ASSISTANT}", assistant).replace("{PROMPT}", prompt)
    return _TOOLS + turns


_EACH = "{% for c in m.tool_calls %}{% set f = c.function %}"
_SAID = "{% if m.content %}{{ m.content }}{% endif %}"

TEMPLATES = {
    "tagged json": _made(
        _SAID + "{% if m.tool_calls %}" + _EACH + "\n<tool_call>\n"
        '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}{% endif %}"
    ),
    "thinking and tagged json": _made(
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        + _SAID + "{% if m.tool_calls %}" + _EACH
        + "{% if not loop.first or m.content %}\n{% endif %}<tool_call>\n"
        '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}{% endif %}",
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    ),
    "bare json": _made(
        "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
        "{% else %}" + _SAID + "{% endif %}"
    ),
    "list of json": _made(
        "{% if m.tool_calls %}[TOOL_CALLS][" + _EACH
        + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}" + _SAID + "{% endif %}"
    ),
    "arguments as text": _made(
        "{% if m.tool_calls %}" + _EACH
        + '[CALL]{"type": "function", "name": "{{ f.name }}", "arguments": {{ f.arguments }}}[/CALL]'
        "{% endfor %}{% else %}" + _SAID + "{% endif %}"
    ),
    "named": _made(
        _SAID + "{% if m.tool_calls %}" + _EACH
        + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}{% endfor %}{% endif %}"
    ),
    "named in sections": _made(
        _SAID + "{% if m.tool_calls %}<|calls|>" + _EACH
        + "<|call|>functions.{{ f.name }}:{{ loop.index0 }}<|args|>{{ f.arguments | tojson }}<|end|>"
        "{% endfor %}<|calls_end|>{% endif %}"
    ),
    "xml": _made(
        _SAID + "{% if m.tool_calls %}" + _EACH + "\n<tool_call>\n<function={{ f.name }}>\n"
        "{% for k, v in f.arguments | items %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>{% endfor %}{% endif %}"
    ),
    "keys and values": _made(
        _SAID + "{% if m.tool_calls %}" + _EACH + "\n<tool_call>{{ f.name }}\n"
        "{% for k, v in f.arguments | items %}<arg_key>{{ k }}</arg_key>\n"
        "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
        "{% endfor %}{% endif %}"
    ),
    "quoted": _made(
        "{% if m.tool_calls %}" + _EACH + "<|call>call:{{ f.name }}{{ '{' }}"
        "{% for k, v in f.arguments | items %}{{ k }}:"
        "{% if v is string %}<|\"|>{{ v }}<|\"|>{% else %}{{ v | tojson }}{% endif %}"
        "{% if not loop.last %},{% endif %}{% endfor %}}<call|>{% endfor %}{% else %}" + _SAID
        + "{% endif %}"
    ),
    "typed values": _made(
        _SAID + "{% if m.tool_calls %}<calls>\n" + _EACH + '<invoke name="{{ f.name }}">\n'
        '{% for k, v in f.arguments | items %}<parameter name="{{ k }}" '
        "string=\"{{ 'true' if v is string else 'false' }}\">"
        "{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n"
        "{% endfor %}</calls>{% endif %}"
    ),
    "sorted keys": _made(
        _SAID + "{% if m.tool_calls %}" + _EACH + "<call {{ f.name }}>"
        "{% for k, v in f.arguments | dictsort %}<arg {{ k }}>{{ v if v is string else v | tojson }}</arg>"
        "{% endfor %}</call>{% endfor %}{% endif %}"
    ),
    "counted json": _made(
        "{% if m.tool_calls %}<|actions|>[" + _EACH
        + '{"call_no": "{{ loop.index0 }}", "tool": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
        "{% if not loop.last %},{% endif %}\n{% endfor %}]<|actions_end|>{% else %}" + _SAID + "{% endif %}"
    ),
    "named behind content": _made(
        "{% if m.content %}>>>all\n{{ m.content }}{% endif %}{% if m.tool_calls %}" + _EACH
        + ">>>{{ f.name }}\n{{ f.arguments | tojson }}{% endfor %}{% endif %}",
        ">>>",
    ),
    "keys and values on lines": _made(
        "<think>{{ m.reasoning_content }}</think>\n" + _SAID + "{% if m.tool_calls %}" + _EACH
        + "\n<tool_call>{{ f.name }}\n"
        "{% for k, v in f.arguments | items %}<arg_key>{{ k }}</arg_key>\n"
        "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
        "{% endfor %}{% endif %}"
    ),
    "invoked": _made(
        _SAID + "{% if m.tool_calls %}\n<x:tool_call>\n" + _EACH + '<invoke name="{{ f.name }}">\n'
        '{% for k, v in f.arguments | items %}<parameter name="{{ k }}">'
        "{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n"
        "{% endfor %}</x:tool_call>{% endif %}"
    ),
    "behind instructions": _made(
        "{{ m.content }}{% if m.tool_calls %}\nAction:\n[" + _EACH
        + '{"tool_name": "{{ f.name }}", "parameters": {{ f.arguments | tojson(indent=4) }}}'
        "{% if not loop.last %},\n{% endif %}{% endfor %}]{% endif %}"
    ).replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt %}<|im_start|>system\nAct.<|im_end|>\n"
    ),
    "channels": _made(
        "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        "{% if m.content %}<|channel|>analysis<|message|>{{ m.content }}<|end|><|start|>assistant{% endif %}"
        " to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>"
        "{% else %}{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant"
        "{% endif %}<|channel|>final<|message|>{{ m.content }}{% endif %}"
    ).replace("<|im_start|>assistant\n", "<|start|>assistant"),
}  # fmt: skip
# Of what this writes, no reader can tell where a value ends, or which kind it is.
AMBIGUOUS = _made(
    "{% if m.tool_calls %}[" + _EACH + "{{ f.name }}({% for k, v in f.arguments | items %}"
    "{{ k }}=\"{{ v }}\"{% if not loop.last %}, {% endif %}{% endfor %})"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}" + _SAID + "{% endif %}"
)  # fmt: skip
THINKING = {
    "field": TEMPLATES["thinking and tagged json"],
    "cut": _made("{{ m.content.split('</think>')[-1] }}", "<think>\n"),
    "switch": _made(
        _SAID, "{% if not enable_thinking | default(true) %}<think></think>{% endif %}"
    ),
    "prompt": _made(_SAID, "<think>\n"),
}

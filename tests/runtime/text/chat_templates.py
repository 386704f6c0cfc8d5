"""Chat templates in the styles of well-known families, written for the tests; and conversations to give them."""

from typing import Any

from ferrum_rt.interfaces.types import ChatMessage, FunctionCall, Tool, ToolCall, ToolFunction

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

TEMPLATES = {
    "chatml": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama-2": """\
{% if messages[0]['role'] == 'system' %}
    {% set turns = messages[1:] %}
    {% set preamble = messages[0]['content'] %}
{% else %}
    {% set turns = messages %}
    {% set preamble = false %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must go user, assistant, user, assistant') }}
    {% endif %}
    {% if loop.first and preamble != false %}
        {% set text = '<<SYS>>\\n' + preamble + '\\n<</SYS>>\\n\\n' + turn['content'] %}
    {% else %}
        {% set text = turn['content'] %}
    {% endif %}
    {% if turn['role'] == 'user' %}
{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {% elif turn['role'] == 'assistant' %}
{{ ' ' + text.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
""",
    "llama-3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set about = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set about = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You may call these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- about + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be strings of length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] in ["tool_results", "tool"] %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, not " + message.role) }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "phi-3": """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + \
message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}\
{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "qwen": """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <object>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and \
message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "command-r": """\
{{ bos_token }}
{%- macro type_of(schema) -%}
    {%- if schema.type == 'array' and schema['items'] -%}
        List[{{ type_of(schema['items']) }}]
    {%- elif schema.type == 'object' -%}
        Dict[{% for name, inner in schema.properties | dictsort %}{{ name }}: {{ type_of(inner) }}\
{{ ', ' if not loop.last }}{% endfor %}]
    {%- elif schema.type is string -%}
        {{ {'string': 'str', 'integer': 'int', 'number': 'float'}.get(schema.type, schema.type) }}
    {%- else -%}
        {{ schema.type | default(['Any'], true) | join(' | ') }}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set rest, about = messages[1:], messages[0]['content'] -%}
{%- else -%}
    {%- set rest, about = messages, 'You are a helper.' -%}
{%- endif -%}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' ~ about ~ '\n' }}
{%- for tool in tools or [] %}
```python
def {{ tool.function.name }}({% for name, schema in tool.function.parameters.properties | items -%}
    {{ ', ' if not loop.first }}{{ name }}: {{ type_of(schema) }}
    {{- ' = None' if name not in tool.function.parameters.required | default([]) }}
{%- endfor %}):
    \"\"\"{{ tool.function.description | indent(4) }}\"\"\"
```
{%- endfor %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- for message in rest -%}
    {%- set content = message['content'].strip() or 'nothing' -%}
    {%- set speaker = {'user': 'USER', 'assistant': 'CHATBOT', 'tool': 'SYSTEM'}[message.role] -%}
    {{ '<|START_OF_TURN_TOKEN|><|' ~ speaker ~ '_TOKEN|>' ~ content }}
    {%- if message.tool_calls %}
Action:
{{ message.tool_calls | map(attribute='function') | list | tojson(indent=4) }}
    {%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' ~ loop.index ~ '/' ~ loop.length }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}
""",
    "deepseek": """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{% macro call_text(call, is_first=true) -%}
<|tool▁call▁begin|>{{ call.type }}<|tool▁sep|>{{ call.function.name }}{{ caller() if caller else '' }}
```json
{{ call.function.arguments | tojson(ensure_ascii=true, sort_keys=true) }}
```<|tool▁call▁end|>
{%- endmacro -%}
{% set ns = namespace(is_first=true, is_tool=false, system_prompt='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.system_prompt = ns.system_prompt + ('' if ns.is_first else '\\n\\n') + message['content'] -%}
        {%- set ns.is_first = false -%}
    {%- endif -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- set ns.is_tool = false -%}
        {{ '<|User|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] -%}
        {{ '<|Assistant|><|tool▁calls▁begin|>' }}
        {%- for tool_call in message['tool_calls'] -%}
            {{ '' if loop.first else '\\n' }}
            {%- call call_text(tool_call, is_first=loop.first) %}#{{ loop.index }}{% endcall -%}
        {%- endfor -%}
        {{ '<|tool▁calls▁end|>' + eos_token }}
    {%- elif message['role'] == 'assistant' -%}
        {%- set content = message['content'] -%}
        {%- if '</think>' in content -%}{%- set content = content.split('</think>', 1)[-1] -%}{%- endif -%}
        {{ ('<|tool▁outputs▁end|>' if ns.is_tool else '<|Assistant|>') + content + eos_token }}
        {%- set ns.is_tool = false -%}
    {%- elif message['role'] == 'tool' -%}
        {{ ('' if ns.is_tool else '<|tool▁outputs▁begin|>') + message['content'] }}
        {%- set ns.is_tool = true -%}
    {%- endif -%}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|>' }}{% endif %}
""",
    "generation": """\
{%- set seen = namespace(count=0) %}
{%- for message in messages %}
  {%- set shown = message.content %}
  {%- if message.role == 'assistant' %}
    {%- generation %}
      {%- set shown = 'inner' %}
      {%- set seen.count = seen.count + 1 %}
      {{- message.content }}
      {%- for call in message.tool_calls or [] %} {{ call.id }}{% endfor %}
{{ eos_token }}
    {%- endgeneration %}
  {%- endif %}
  {{- shown }}|{{ loop.index }}
{%- endfor %}
{{ seen.count }}
""",
    "loop controls": """\
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% for word in message.content.split() %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ loop.cycle('-', '+') }}{{ word }} {{ loop.previtem | default('first') }} {{ loop.changed(word[:1]) }}
{% else %}
(nothing)
{% endfor %}
{% else %}
(nobody)
{% endfor %}
""",
    "json": """\
{{ messages | tojson(indent=4) }}
{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}
{{ {'ä': '<&>"', 'tools': tools} | tojson }}{{ messages | map(attribute='content') | list | tojson(ensure_ascii=true) }}
{% for message in messages %}{{ message | tojson | safe + '&' }}{{ message.content | e }}{{ message }}{% endfor %}
""",
    "whitespace": """\
  {% if true %}
    kept
  {%- endif +%}
 \t{% for message in messages -%}
   {{ loop.index }}:   {{- message.content | trim }}   \n
{#- a comment -#}
  {%+ if loop.last %}last{% endif %}
   {% endfor %}

 {{ messages[-1].content.lstrip() }}{{ messages[-1].content.rstrip() }}{{ messages[-1].content | trim('.') }}
\t
""",
    "arithmetic and strings": """\
{% set n = messages | length %}{{ n + 1 }} {{ n - 1 }} {{ n * 2 }} {{ n ** 2 }} {{ n % 2 }} {{ n // 2 }} {{ n / 4 }} {{ -n }}
{{ 'ab' * 3 }} {{ [n] * 2 + [1] }} {{ '%s is %03d' % ('n', n) }} {{ '{:>8}|{}'.format(n, 'x') }} {{ 1 ~ 'a' ~ none }}
{{ 1 < n <= 9 }} {{ 'a' < 'b' }} {{ n not in [1, 2] }} {{ 'u' in messages[0].role }} {{ no_name == '' }} {{ [1] == [1] }}
{{ messages | map(attribute='role') | unique | join(', ') }} {{ messages | map('length') | sum }} {{ range(3) | list }}
{{ messages | groupby('role') | map('first') | list }} {{ 'one two' | title | center(20) | replace(' ', '_') }}
{{ dict(a=1, b=[2]) | dictsort }} {{ namespace(a=1).a }} {{ (1, 2)[0] }} {{ 'abc'[::-1] }} {{ 'a,b'.rsplit(',', 1) }}
{% for row in messages | batch(2, none) %}{{ row | map(attribute='role') | join('+') }};{% endfor %}
{% set text %}{% for m in messages recursive %}{{ m.role[:1] }}{{ loop([{'role': 'x'}]) if m.content is defined }}\
{% endfor %}{% endset %}{{ text | upper }} {% filter lower %}{{ messages[0].content }}{% endfilter %}
{% macro show() %}{{ varargs | length }} {{ kwargs | dictsort }}{% endmacro %}{{ show(1, 2, b=3) }} {{ 'c' if n > 99 }}
{{ messages | selectattr('name', 'defined') | map(attribute='name') | list }} {{ documents is none }} {{ tools is none }}
{% block greeting %}hi {{ n }}{% endblock %}{{ self.greeting() }} {% with a = 1 %}{{ a }}{% endwith %}\
{{ '%5.2f' | format(n) }}
""",
}


def user(content: str) -> ChatMessage:
    return ChatMessage(role="user", content=content)


def assistant(content: str = "", **calls: str) -> ChatMessage:
    """``calls`` are functions' names and their arguments, as JSON."""
    tool_calls = [
        ToolCall(id=f"call{number:05}", function=FunctionCall(name=name, arguments=arguments))
        for number, (name, arguments) in enumerate(calls.items())
    ]
    return ChatMessage(role="assistant", content=content, tool_calls=tool_calls)


def system(content: str) -> ChatMessage:
    return ChatMessage(role="system", content=content)


def result(content: str, call: str = "call00000") -> ChatMessage:
    return ChatMessage(role="tool", content=content, tool_call_id=call)


def tool(name: str, description: str = "", **parameters: Any) -> Tool:
    return Tool(function=ToolFunction(name=name, description=description, parameters=parameters))


TOOLS = [
    tool(
        "get_weather",
        'What it is like in a "city",\nnow & later: größer, 你好.',
        type="object",
        properties={
            "city": {"type": "string", "description": "Its <name>"},
            "days": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            "where": {"type": "object", "properties": {"lon": {"type": "number"}, "lat": {"type": ["number", "null"]}}},
        },
        required=["city"],
    ),
    tool("now"),
]

CONVERSATIONS = {
    "one question": [user("What is 2 + 2?")],
    "system": [system("Be brief."), user("Hello")],
    "several turns": [system(" Be brief.\n"), user("Hi"), assistant("Hello!"), user(" And\nnow? ")],
    "without system": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    "ends with the assistant": [user("a"), assistant("<think>\nhm\n</think>\n\nb")],
    "begins with the assistant": [assistant("b"), user("a")],
    "two users": [user("a"), user("b")],
    "late system": [user("a"), assistant("b"), system("c"), user("d")],
    "two systems": [system("a"), system("b"), user("c")],
    "tool call": [user("Weather?"), assistant(get_weather='{"city": "Zürich", "days": [[1, 2.5], [true, null]]}')],
    "tool result": [
        user("Weather?"),
        assistant("Let me see.", get_weather='{"city": "Zürich"}'),
        result('{"sky": "<blue>"}'),
        assistant("Blue."),
        user("Thanks"),
    ],
    "two calls": [
        system("Call."),
        user("Both"),
        assistant("", get_weather='{"city": "X", "where": {"lat": 1e300}}', now="{}"),
        result("1"),
        result("2", "call00001"),
    ],
    "arguments that are no object": [user("a"), assistant("", a="[1, 2]", b="not JSON {", c='"text"', d=""), result("b")],
    "unicode": [system("Größe"), user("你好 🙂\u200d\u2028\x85 ä\u0308"), assistant("שלום"), user("\u00a0ok\u3000")],
    "empty": [system(""), user(""), assistant(""), user("")],
    "template code": [user("{{ messages }} {% for x in y %} {# no #}"), assistant("{%- raw %}"), user("}} %}")],
    "html": [user("<b>&amp;</b> \"quoted\" 'single'"), assistant("</s><|im_end|>"), user("&")],
    "whitespace": [user("\n\n  lead"), assistant("trail \t\n"), user("\r\n..x.. \n")],
    "names": [ChatMessage(role="user", content="a", name="Ada"), assistant("b"), ChatMessage(role="developer", content="c")],
}

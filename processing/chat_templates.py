"""The two chat templates of Qwen-VL, in Jinja.

They are Python strings and not files because the Hub copies modules only. `piece_break` is empty unless
QwenVLProcessor tokenizes: then it keeps what it separates from being merged into one token, as the original does by
encoding the pieces of a chat one by one.
"""

# Texts as they are, a picture as its slot, with its number in the conversation where `is_numbered`.
_WRITE = r"""
{%- set state = namespace(pictures=0) -%}
{%- macro write(content, is_numbered) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type == 'image' -%}
                {%- set state.pictures = state.pictures + 1 -%}
                {%- if is_numbered and (part.numbered is not defined or part.numbered) -%}
                    {{- 'Picture ' ~ state.pictures ~ ': <img><imgpad></img>\n' -}}
                {%- else -%}
                    {{- '<img><imgpad></img>' -}}
                {%- endif -%}
            {%- else -%}
                {{- raise_exception('Qwen-VL reads parts of type text and image, not ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

CHATML_TEMPLATE = (
    _WRITE
    + r"""
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not message.content and message.content is not string -%}
        {#- None, an answer not known: the original leaves out all of its message but a line break. -#}
        {{- piece_break ~ '\n' ~ piece_break -}}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ piece_break -}}
        {%- if message.role == 'assistant' -%}
            {%- generation -%}
                {{- write(message.content, true) ~ '<|im_end|>' -}}
            {%- endgeneration -%}
        {%- else -%}
            {{- write(message.content, true) ~ '<|im_end|>' -}}
        {%- endif -%}
        {{- '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
).strip()
"""ChatML as in Qwen-VL-Chat: `Picture k: ` before each picture, counted through the conversation, and a line break
behind it; an image part with `"numbered": False` is the picture alone."""

PLAIN_TEMPLATE = (
    _WRITE
    + r"""
{%- for message in messages -%}
    {{- piece_break -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- write(message.content, false) ~ '<|endoftext|>' -}}
        {%- endgeneration -%}
    {%- elif message.role == 'user' -%}
        {{- write(message.content, false) -}}
    {%- else -%}
        {{- raise_exception('The plain template has no place for a message of role ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
"""
).strip()
"""Training stages 1 and 2: texts and pictures one after the other, `<|endoftext|>` behind what the assistant says."""

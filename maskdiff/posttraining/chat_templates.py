"""Chat templates by name, in the language of Hugging Face's templates (Jinja).

Each one renders a conversation of texts with the roles system, user, assistant
and tool byte for byte as the published template does. Declarations and calls of
tools are left out. The published templates read the same variables: `messages`,
`bos_token`, `add_generation_prompt` and, for Qwen3, `enable_thinking`.
"""

# A header with the role, a blank line, the trimmed content, the end of turn.
_HEADERS = """
{%- macro header(role) -%}
{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- endmacro -%}
{%- macro turn(message) -%}
{{ header(message.role) ~ message.content | trim ~ '<|eot_id|>' }}
{%- endmacro -%}
"""
_BOS_AND_TURNS = (
  _HEADERS
  + """
{%- for message in messages -%}
{{ (bos_token if loop.first else '') ~ turn(message) }}
{%- endfor -%}
"""
)
_IF_ASKED = """
{%- if add_generation_prompt -%}
{{ header('assistant') }}
{%- endif -%}
"""

# Results of tools that follow one another are a turn of the user.
_QWEN_TOOL = """
{%- macro tool(message, previous, next) -%}
{{ '<|im_start|>user' if previous.role != 'tool' else '' }}
{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if next.role != 'tool' else '' }}
{%- endmacro -%}
"""

# A default system turn if the first message is not one; nothing is trimmed.
_QWEN25 = (
  _QWEN_TOOL
  + """
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
{{ tool(message, loop.previtem or {}, loop.nextitem or {}) }}
  {%- else -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
)

# Assistant turns before the last user turn lose their thoughts. Of the turns
# after it, the last one always has a block of thoughts, if only an empty one.
_QWEN3 = (
  _QWEN_TOOL
  + """
{%- set last_user = namespace(index=messages | length - 1) -%}
{%- for message in messages if message.role == 'user' -%}
  {%- if not (message.content.startswith('<tool_response>')
      and message.content.endswith('</tool_response>')) -%}
    {%- set last_user.message = message -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message is sameas last_user.message -%}
    {%- set last_user.index = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set turn = namespace(text=message.content, thoughts='') -%}
  {%- if message.role == 'assistant' -%}
    {%- if message.reasoning_content is string -%}
      {%- set turn.thoughts = message.reasoning_content -%}
    {%- elif '</think>' in turn.text -%}
      {%- set parts = turn.text.split('</think>') -%}
      {%- set before = parts[0].rstrip('\\n').split('<think>') -%}
      {%- set turn.thoughts = (before | last).lstrip('\\n') -%}
      {%- set turn.text = (parts | last).lstrip('\\n') -%}
    {%- endif -%}
    {%- if loop.index0 > last_user.index and (loop.last or turn.thoughts) -%}
      {%- set turn.text = '<think>\\n' ~ turn.thoughts.strip('\\n')
          ~ '\\n</think>\\n\\n' ~ turn.text.lstrip('\\n') -%}
    {%- endif -%}
  {%- endif -%}
  {%- if message.role == 'tool' -%}
{{ tool(message, loop.previtem or {}, loop.nextitem or {}) }}
  {%- else -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ turn.text ~ '<|im_end|>\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
  {%- endif -%}
{%- endif -%}
"""
)

TEMPLATES = {
  # For tokenizers without tokens for turns, such as those of
  # tokenizer/train.py: a turn is the role on a line of its own, the content
  # and eos. The content cannot contain eos, so it cannot begin a turn.
  'plain': """
{%- for message in messages -%}
{{ (bos_token if loop.first else '') ~ message.role ~ '\\n' }}
{{- message.content ~ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'assistant\\n' }}
{%- endif -%}
""",
  # As published with GSAI-ML/LLaDA-8B-Instruct: always ends with the header of
  # the next answer.
  'llada': _BOS_AND_TURNS + "{{- header('assistant') -}}",
  # dLLM adds that header only after a turn of another role.
  'llada_dllm': _BOS_AND_TURNS
  + """
{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}
{{ header('assistant') }}
{%- endif -%}
""",
  # NeMo Automodel marks the answers with their ends of turn.
  'llada_nemo': _HEADERS
  + """
{%- for message in messages -%}
{{ bos_token if loop.first else '' }}
  {%- if message.role == 'assistant' -%}
{{ header('assistant') }}
    {%- generation -%}
{{ message.content | trim ~ '<|eot_id|>' }}
    {%- endgeneration -%}
  {%- else -%}
{{ turn(message) }}
  {%- endif -%}
{%- endfor -%}
"""
  + _IF_ASKED,
  'llama3': _BOS_AND_TURNS + _IF_ASKED,
  # Qwen2.5 and Fast-dLLM v2.
  'qwen25': _QWEN25,
  # Qwen3 and SDAR.
  'qwen3': _QWEN3,
}

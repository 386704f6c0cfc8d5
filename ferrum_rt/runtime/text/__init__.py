"""Between text and token ids: prompts, outputs, tool calls, and grammars that outputs are held to."""

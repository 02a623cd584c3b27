"""From a question to prompt ids, by the tokenizer's own chat template."""

from __future__ import annotations

from models.family import LoadedModel


def encode_prompt(loaded: LoadedModel, question: str, template: str, start_with_think: bool = False) -> list[int]:
    """Ids of a user's turn asking `question` within the instruction `template`, up to where the assistant begins."""
    turns = [{"role": "user", "content": template.replace("{question}", question)}]
    text = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if start_with_think:
        text += "<think>"
    return loaded.tokenizer.encode(text, add_special_tokens=False)

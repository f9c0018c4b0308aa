"""From a row to tokens: tokenizer, chat template and loss mask. No torch."""

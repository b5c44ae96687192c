"""The bundled pocket model: weights, tokenizer and data files, no code. Its README.md is the model card."""

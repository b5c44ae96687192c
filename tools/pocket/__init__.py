"""The factory of the bundled `pocket` model: a closed world, a corpus, a tokenizer, a training loop and probes."""

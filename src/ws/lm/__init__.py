"""A language model: loading, chat format, modules, answers, sampled or scored, and how far two answers diverge."""

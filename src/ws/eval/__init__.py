"""Evaluations: functions of a model and a tokenizer that cannot know how, or whether, the model is steered."""

"""A vector in other people's formats: PEFT, merged checkpoints, llama.cpp, the hub."""

"""What weight steering is compared with: a system prompt, and a direction added to the activations."""

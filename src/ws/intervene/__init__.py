"""Everything that can be done to a model behind one dial, and the strengths that cost the same."""

"""The `out/` folder: layout, manifests, atomic writes, tables, tensors and pictures."""

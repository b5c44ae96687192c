"""The `out/` folder: layout, manifests, whole writes, checked reads, places, tables, tensors and pictures."""

"""Raw log -> batches: schema, sources, transform, prepare, reader."""

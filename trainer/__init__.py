"""Raw log -> prepared Parquet -> checkpoint. Knows nothing of compression or serving."""

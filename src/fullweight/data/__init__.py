"""Data: sources -> `render` (messages to tokens and loss mask) -> packing -> batches.

- `sources`: JSONL, Parquet and datasets, by column mapping.
- `encoding`: the chat encodings, one data file per version; `render`: conversations to trained tokens.
- `tokenizer`: the model's own tokenizer, or a small one trained from the data.
- `packing`, `loader`: documents into rows of fixed length, resumable.
- `synth`: generated tasks with an exact checker.
"""
